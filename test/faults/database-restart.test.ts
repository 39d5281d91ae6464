import { chmodSync, mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { createLogger } from "@palebluedot/shared/logger.ts";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import {
  startEmbeddedPostgres,
  type EmbeddedPostgres,
} from "../../packages/controller/src/db/embedded-postgres.ts";
import { createApi, type Api, type Json } from "../../packages/simulator/src/cluster/api.ts";
import { startController, type ControllerProcess } from "../../packages/simulator/src/cluster/controller.ts";
import { eventually } from "../../packages/simulator/src/cluster/eventually.ts";
import { startFleet, type Fleet } from "../../packages/simulator/src/fleet/fleet.ts";
import { untilState } from "../support/platform.ts";

describe("PostgreSQL restarted under a running controller", () => {
  let directory: string;
  let database: EmbeddedPostgres;
  let controller: ControllerProcess;
  let fleet: Fleet;
  let api: Api;
  const log = createLogger({ name: "test", level: "silent" });

  beforeAll(async () => {
    directory = mkdtempSync(join(tmpdir(), "palebluedot-db-"));
    // The database runs as a user of its own, who must be able to pass.
    chmodSync(directory, 0o711);
    database = await startEmbeddedPostgres({ directory: join(directory, "postgres"), log });
    controller = await startController({ dataDir: join(directory, "controller"), databaseUrl: database.url });
    const token = await controller.api.post("/api/v1/join-tokens", {
      name: "t",
      auto_approve: true,
      max_uses: 10,
    });
    fleet = await startFleet({
      controller: controller.enrolmentEndpoint,
      caFingerprint: controller.caFingerprint,
      joinToken: token.token,
      agents: 2,
      gpusPerServer: 2,
      telemetryIntervalMs: 1000,
    });
    await eventually(
      "available",
      async () => (await controller.api.get("/api/v1/servers?state=available")).items.length === 2,
    );
    const tenant = await controller.api.post("/api/v1/tenants", { name: "steady" });
    const tenantToken = await controller.api.post(`/api/v1/tenants/${tenant.id}/tokens`, { name: "t" });
    api = createApi(controller.url, tenantToken.token);
  });
  afterAll(async () => {
    await fleet?.stop();
    await controller?.stop();
    await database?.stop();
    rmSync(directory, { recursive: true, force: true });
  });

  const request = { gpus: { count: 1 }, container: { image: "test/idle" }, lease_seconds: 600 };

  it("keeps what was accepted, refuses in words meanwhile, and goes on by itself", async () => {
    const before = await api.post("/api/v1/allocations", request);
    await untilState(api, before.id, "active");
    await database.stop();

    // The controller stays up and says what is wrong, instead of hanging or dying.
    const ready = await eventually("not ready", async () => {
      const response = await fetch(`${controller.url}/readyz`);
      return response.status === 503 ? response : undefined;
    });
    expect(ready.status).toBe(503);
    const refused = await api.request("POST", "/api/v1/allocations", request, {
      "idempotency-key": "during",
    });
    expect([500, 503]).toContain(refused.status);
    expect(refused.status).toBe(503);
    expect(refused.body.code).toMatch(/^[a-z-]+$/);
    expect(controller.isRunning()).toBe(true);

    database = await startEmbeddedPostgres({ directory: join(directory, "postgres"), log });
    await eventually("ready again", async () => (await fetch(`${controller.url}/readyz`)).ok, {
      timeoutMs: 60_000,
    });
    expect(controller.isRunning()).toBe(true);

    const again = await eventually<Json>(
      "accepted again",
      () => api.post("/api/v1/allocations", request, { "idempotency-key": "during" }),
      { timeoutMs: 60_000 },
    );
    await untilState(api, again.id, "active");
    expect((await api.get(`/api/v1/allocations/${before.id}`)).state).toBe("active");
    for (const id of [before.id, again.id]) {
      await api.delete(`/api/v1/allocations/${id}`);
      await untilState(api, id, "ended");
    }
    const { items } = await api.get("/api/v1/allocations");
    expect(items).toHaveLength(2);
  });
});
