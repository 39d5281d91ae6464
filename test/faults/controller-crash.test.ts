import { randomUUID } from "node:crypto";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { failpointNames } from "../../packages/controller/src/reconciler/failpoints.ts";
import { createApi, type Json } from "../../packages/simulator/src/cluster/api.ts";
import { eventually } from "../../packages/simulator/src/cluster/eventually.ts";
import { startFleet, type Fleet } from "../../packages/simulator/src/fleet/fleet.ts";
import { startPlatform, untilState, type TestPlatform } from "../support/platform.ts";

/**
 * The controller dies by SIGKILL at each named point between the acceptance of an allocation and its being
 * active, and starts again on the same database. Whatever the point: the allocation becomes active once,
 * its GPUs are claimed once, and nothing is left behind after its release.
 */
describe("the controller killed at every fail-point", () => {
  let platform: TestPlatform;
  let fleet: Fleet;
  const startCommands: string[] = [];

  beforeAll(async () => {
    platform = await startPlatform();
    fleet = await startFleet({
      controller: platform.controller.enrolmentEndpoint,
      caFingerprint: platform.controller.caFingerprint,
      joinToken: await platform.joinToken(),
      agents: 2,
      gpusPerServer: 2,
      telemetryIntervalMs: 5000,
      onStartCommand: (allocationId) => startCommands.push(allocationId),
    });
    await untilFleetIsBack();
  });
  afterAll(async () => {
    await fleet?.stop();
    await platform?.[Symbol.asyncDispose]();
  });

  async function untilFleetIsBack(): Promise<void> {
    await eventually(
      "both servers are available and connected",
      async () => {
        const { items } = await platform.admin.get("/api/v1/servers?state=available");
        return items.filter((item: Json) => item.connected).length === 2;
      },
      { timeoutMs: 60_000 },
    );
  }

  it.each(failpointNames)("%s", async (failpoint) => {
    const tenant = await platform.tenant(`crash-${failpoint}`);
    await platform.controller.stop();
    let died = false;
    platform.controller = await platform.controller
      .restart({ PALEBLUEDOT_FAILPOINT: failpoint })
      .catch(async () => {
        // The hosts come back and report at once, so some points are passed while it starts already.
        died = true;
        return platform.controller.restart({});
      });
    const url = platform.controller.url;
    const key = randomUUID();
    const request = {
      gpus: { count: 2 },
      container: { image: "test/idle" },
      lease_seconds: 600,
    };
    // The client does what clients do: the same request with the same key until it has an answer.
    const api = createApi(url, tenant.api.token);
    const post = (): Promise<Json> => api.post("/api/v1/allocations", request, { "idempotency-key": key });
    const first = await post().catch(() => undefined);
    await Promise.race([
      platform.controller.exited,
      eventually("it is active although nothing died", async () => {
        if (first === undefined) return undefined;
        return (await api.get(`/api/v1/allocations/${first.id}`)).state === "active";
      }).catch(() => undefined),
    ]);
    died ||= !platform.controller.isRunning();
    if (platform.controller.isRunning()) await platform.controller.kill();
    platform.controller = await platform.controller.restart({});
    const allocation = await post();
    if (first !== undefined) expect(allocation.id).toBe(first.id);

    const active = await untilState(api, allocation.id, "active");
    expect(active.gpus).toHaveLength(2);
    const { sql } = platform.database;
    const [counts] = await sql<{ claims: number; distinct: number; allocations: number }[]>`
      select count(*)::int as claims, count(distinct gpu_id)::int as distinct,
             (select count(*)::int from allocations where tenant_id = ${tenant.id}) as allocations
      from claims where allocation_id = ${allocation.id}`;
    expect(counts).toEqual({ claims: 2, distinct: 2, allocations: 1 });
    // However often the document was sent, it held this workload once, on one server.
    expect(startCommands.filter((id) => id === allocation.id)).toHaveLength(1);

    await api.delete(`/api/v1/allocations/${allocation.id}`);
    await untilState(api, allocation.id, "ended");
    const [leaked] = await sql`select count(*)::int as count from claims where released_at is null`;
    expect(leaked).toEqual({ count: 0 });
    // Every state was entered exactly once, whatever was repeated.
    const entered = await eventually("the events are in the stream", async () => {
      const rows = await sql<{ type: string; count: number }[]>`
        select type, count(*)::int as count from events
        where allocation_id = ${allocation.id} and type like 'allocation.%' group by type`;
      return rows.some((row) => row.type === "allocation.ended") ? rows : undefined;
    });
    expect(Object.fromEntries(entered.map((row) => [row.type, row.count]))).toMatchObject({
      "allocation.queued": 1,
      "allocation.scheduled": 1,
      "allocation.active": 1,
      "allocation.releasing": 1,
      "allocation.ended": 1,
    });
    expect(died, `the controller passed the fail-point ${failpoint} and lived`).toBe(true);
    await untilFleetIsBack();
  });
});
