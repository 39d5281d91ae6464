import { join } from "node:path";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import type { Json } from "../../packages/simulator/src/cluster/api.ts";
import { eventually } from "../../packages/simulator/src/cluster/eventually.ts";
import { startPart } from "../../packages/simulator/src/cluster/process.ts";
import { engineGet } from "../../packages/simulator/src/demo/docker-load.ts";
import { setFault } from "../../packages/simulator/src/server.ts";
import { startPlatform, untilState, type TestHost, type TestPlatform } from "../support/platform.ts";

/** The watchdog gives up on the agent's first look after 60 s; nothing else may wait for that. */
const soonMs = 30_000;

describe("an agent that starts while nvidia-smi hangs, on the simulated engine", () => {
  let platform: TestPlatform;
  let host: TestHost;
  let tenant: Awaited<ReturnType<TestPlatform["tenant"]>>;
  let socket = "";

  beforeAll(async () => {
    platform = await startPlatform();
    host = await platform.addHost({
      name: "wedged",
      model: "a100",
      count: 2,
      env: (server) => {
        socket = join(server.stateDir, "engine.sock");
        const engine = startPart("simulator", ["engine", "--state", server.stateDir, "--socket", socket], {
          env: {},
          logFile: join(server.stateDir, "engine.log"),
        });
        platform.defer(() => engine.stop());
        return { DOCKER_HOST: `unix://${socket}` };
      },
    });
    tenant = await platform.tenant("patient");
  });
  afterAll(async () => {
    await platform?.[Symbol.asyncDispose]();
  });

  const server = (): Promise<Json> => platform.admin.get(`/api/v1/servers/${host.serverId}`);
  const running = async (): Promise<string[]> =>
    ((await engineGet(socket, "/containers/json")) as Json[]).map((container) => container.Id);

  it("connects, adopts containers and releases them, and says that nobody has seen the GPUs yet", async () => {
    const accepted = await tenant.api.post("/api/v1/allocations", {
      gpus: { count: 1 },
      container: { image: "sim/burn", stop_grace_seconds: 0 },
      lease_seconds: 600,
    });
    const allocation = await untilState(tenant.api, accepted.id, "active");
    const containerId: string = allocation.observed.container_id;
    await host.agent.kill();
    await eventually("the controller sees that it is gone", async () => !(await server()).connected);
    setFault(host.server.stateDir, { kind: "hang", ignore_sigterm: true });

    const startedAt = performance.now();
    host.agent = host.agent.restart();
    await eventually("the agent is connected", async () => (await server()).connected, {
      timeoutMs: soonMs,
    });
    const condition = await eventually(
      "nvidia-smi was not seen yet",
      async () =>
        (await server()).conditions.find(
          (each: Json) => each.name === "nvidia-smi" && each.reason === "not-seen-yet",
        ),
      { timeoutMs: soonMs },
    );
    expect(condition.status).toBe("unknown");
    expect(performance.now() - startedAt).toBeLessThan(soonMs);
    const { items: gpus } = await platform.admin.get(`/api/v1/gpus?server_id=${host.serverId}`);
    expect(gpus).toHaveLength(2);
    expect(gpus.every((gpu: Json) => gpu.present !== false)).toBe(true);
    expect(await running()).toEqual([containerId]);
    const adopted = await tenant.api.get(`/api/v1/allocations/${allocation.id}`);
    expect(adopted.state).toBe("active");
    expect(adopted.observed.container_id).toBe(containerId);

    // The container goes at once; its GPU stays the tenant's, because nobody can say that it is empty.
    await tenant.api.delete(`/api/v1/allocations/${allocation.id}`);
    await eventually("the container is gone", async () => (await running()).length === 0, {
      timeoutMs: soonMs,
    });
    expect((await tenant.api.get(`/api/v1/allocations/${allocation.id}`)).state).not.toBe("ended");
    const { items: claimed } = await platform.admin.get(
      `/api/v1/gpus?server_id=${host.serverId}&state=claimed`,
    );
    expect(claimed).toHaveLength(1);
  });

  it("connects a host that was never seen before, without calling it one without GPUs", async () => {
    // A host of its own, because this one's GPUs are known from before.
    const { createSimulatedServer } = await import("../../packages/simulator/src/server.ts");
    const { startAgent } = await import("../../packages/simulator/src/cluster/agent.ts");
    const fresh = createSimulatedServer({
      dir: join(platform.directory, "fresh"),
      model: "t4",
      count: 1,
      hostname: "fresh",
      seed: 977,
      sysfs: true,
    });
    setFault(fresh.stateDir, { kind: "hang" });
    const agent = startAgent({
      dataDir: join(platform.directory, "fresh-agent"),
      controller: platform.controller.enrolmentEndpoint,
      caFingerprint: platform.controller.caFingerprint,
      joinToken: await platform.joinToken(),
      env: { ...fresh.env, DOCKER_HOST: `unix://${socket}` },
    });
    platform.defer(() => agent.kill());
    const found = await eventually(
      "it is connected",
      async () => {
        const { items } = await platform.admin.get("/api/v1/servers?limit=500");
        return items.find((item: Json) => item.serial === fresh.identity.serial && item.connected === true);
      },
      { timeoutMs: soonMs },
    ).catch((error: unknown) => {
      throw new Error(`not connected:\n${agent.logTail()}`, { cause: error });
    });
    const conditions: Json[] = (await platform.admin.get(`/api/v1/servers/${found.id}`)).conditions;
    expect(conditions.find((each) => each.name === "gpu-driver")?.status).not.toBe("absent");
  });
});
