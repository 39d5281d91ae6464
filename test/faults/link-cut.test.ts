import { setTimeout as sleep } from "node:timers/promises";
import { join } from "node:path";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import type { Json } from "../../packages/simulator/src/cluster/api.ts";
import { eventually } from "../../packages/simulator/src/cluster/eventually.ts";
import { startPart } from "../../packages/simulator/src/cluster/process.ts";
import { engineGet } from "../../packages/simulator/src/demo/docker-load.ts";
import { appendXid, clearFaults, setFault } from "../../packages/simulator/src/server.ts";
import { startPlatform, untilState, type TestHost, type TestPlatform } from "../support/platform.ts";
import { startTcpProxy, type TcpProxy } from "../support/tcp-proxy.ts";

const cutMs = 60_000;

describe("one server behind a wire that can be cut, on the simulated engine", () => {
  let platform: TestPlatform;
  let proxy: TcpProxy;
  let host: TestHost;
  let tenant: Awaited<ReturnType<TestPlatform["tenant"]>>;
  let target = { host: "127.0.0.1", port: 0 };

  beforeAll(async () => {
    proxy = await startTcpProxy(() => target);
    platform = await startPlatform({ env: { PALEBLUEDOT_AGENT_ENDPOINT: `127.0.0.1:${proxy.port}` } });
    const facts = JSON.parse(
      (await import("node:fs")).readFileSync(join(platform.controller.dataDir, "controller.json"), "utf8"),
    ) as { agent_port: number };
    target = { host: "127.0.0.1", port: facts.agent_port };
    host = await platform.addHost({
      name: "far-away",
      model: "h100",
      count: 2,
      env: (server) => {
        const socket = join(server.stateDir, "engine.sock");
        const engine = startPart("simulator", ["engine", "--state", server.stateDir, "--socket", socket], {
          env: {},
          logFile: join(server.stateDir, "engine.log"),
        });
        platform.defer(() => engine.stop());
        return { DOCKER_HOST: `unix://${socket}` };
      },
    });
    tenant = await platform.tenant("remote");
  });
  afterAll(async () => {
    await platform?.[Symbol.asyncDispose]();
    await proxy?.[Symbol.asyncDispose]();
  });

  async function start(): Promise<Json> {
    const accepted = await tenant.api.post("/api/v1/allocations", {
      gpus: { count: 1 },
      container: { image: "sim/burn", stop_grace_seconds: 0 },
      lease_seconds: 600,
    });
    return untilState(tenant.api, accepted.id, "active");
  }

  it("keeps containers running through a nvidia-smi that hangs for ever, says so, and recovers", async () => {
    setFault(host.server.stateDir, { kind: "hang" });
    const condition = (): Promise<Json> =>
      platform.admin
        .get(`/api/v1/servers/${host.serverId}`)
        .then((server) => server.conditions.find((each: Json) => each.name === "nvidia-smi"));
    await eventually("the hang is a condition", async () => (await condition())?.status === "failed", {
      timeoutMs: 90_000,
      intervalMs: 250,
    });
    expect((await condition()).reason).toMatch(/unresponsive|hung/);
    // The agent itself is alive: it still starts and tells.
    expect(host.agent.isRunning()).toBe(true);
    clearFaults(host.server.stateDir);
    await eventually("the condition is gone", async () => (await condition())?.status === "ok", {
      timeoutMs: 120_000,
      intervalMs: 250,
    });
  }, 240_000);

  it(
    "loses nothing when the stream is cut for a minute",
    async () => {
      const allocation = await start();
      proxy.cut();
      const cutAt = performance.now();
      // Things that must be told later, exactly once.
      for (const xid of [13, 31, 43]) appendXid(host.server.stateDir, { gpu: 0, xid });
      await eventually(
        "the controller sees that the server is out of reach",
        async () => {
          const server = await platform.admin.get(`/api/v1/servers/${host.serverId}`);
          return server.conditions.some((each: Json) => each.name === "unreachable");
        },
        { timeoutMs: cutMs + 30_000, intervalMs: 500 },
      );
      // Out of reach is not lost: the allocation stays, and so does the container.
      expect((await tenant.api.get(`/api/v1/allocations/${allocation.id}`)).state).toBe("active");
      await sleep(Math.max(0, cutMs - (performance.now() - cutAt)));
      const containers = (await engineGet(
        join(host.server.stateDir, "engine.sock"),
        "/containers/json",
      )) as Json[];
      expect(containers.map((container) => container.Id)).toEqual([allocation.observed.container_id]);
      proxy.restore();
      await eventually(
        "the server is back",
        async () => (await platform.admin.get(`/api/v1/servers/${host.serverId}`)).connected === true,
        { timeoutMs: 60_000 },
      );
      const told = async (): Promise<Json[]> =>
        (await platform.admin.get(`/api/v1/events?server_id=${host.serverId}&type=gpu.xid&limit=100`)).items;
      await eventually("the events have arrived", async () => (await told()).length >= 3);
      // A second delivery would follow the first: the agent sends again what was not acknowledged.
      await sleep(3000);
      const xids = await told();
      expect(xids.map((event: Json) => event.data.xid).toSorted((a: number, b: number) => a - b)).toEqual([
        13, 31, 43,
      ]);
      const after = await tenant.api.get(`/api/v1/allocations/${allocation.id}`);
      expect(after.state).toBe("active");
      expect(after.observed.container_id).toBe(allocation.observed.container_id);
      await tenant.api.delete(`/api/v1/allocations/${allocation.id}`);
      await untilState(tenant.api, allocation.id, "ended");
    },
    cutMs + 180_000,
  );
});
