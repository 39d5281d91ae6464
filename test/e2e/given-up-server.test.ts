import { join } from "node:path";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import type { Json } from "../../packages/simulator/src/cluster/api.ts";
import { eventually } from "../../packages/simulator/src/cluster/eventually.ts";
import { startPart } from "../../packages/simulator/src/cluster/process.ts";
import { startPlatform, type TestPlatform } from "../support/platform.ts";

describe("a server that is given up with an allocation on it", () => {
  let platform: TestPlatform;

  beforeAll(async () => {
    platform = await startPlatform();
  });
  afterAll(async () => {
    await platform?.[Symbol.asyncDispose]();
  });

  it("is retired; its host comes back as another one, clean, and its GPUs wait for an operator", async () => {
    const { admin } = platform;
    const host = await platform.addHost({
      name: "dead",
      model: "l40s",
      count: 1,
      env: (server) => {
        const socket = join(server.stateDir, "engine.sock");
        const engine = startPart(
          "simulator",
          ["engine", `--state=${server.stateDir}`, `--socket=${socket}`],
          {
            env: server.env,
            logFile: join(platform.directory, "engine.log"),
          },
        );
        platform.defer(() => engine.kill());
        return { DOCKER_HOST: `unix://${socket}` };
      },
    });
    const { api } = await platform.tenant("unlucky");
    const made = await api.post("/api/v1/allocations", {
      gpus: { count: 1 },
      container: { image: "sim/train:1", args: ["sh", "-c", "sleep 3600"] },
      lease_seconds: 3600,
    });
    const path = `/api/v1/allocations/${made.id}`;
    await eventually("it is active", async () => (await api.get(path)).state === "active", {
      timeoutMs: 60_000,
    });

    await host.agent.kill();
    const server = `/api/v1/servers/${host.serverId}`;
    await eventually(
      "it is unreachable",
      async () => (await admin.get(server)).conditions.some((one: Json) => one.name === "unreachable"),
      { timeoutMs: 90_000 },
    );
    await admin.post(`${server}/retire`, { abandon_allocations: true, reason: "scrapped" });
    expect(await api.get(path)).toMatchObject({ state: "ended", end_reason: "failed" });

    // Against all expectation it is switched on again, with the container that nobody wants.
    host.agent = host.agent.restart();
    const back: Json = await eventually(
      "it has enrolled as another server",
      async () => {
        const { items } = await admin.get("/api/v1/servers?state=available&limit=10");
        return items.find((one: Json) => one.id !== host.serverId);
      },
      { timeoutMs: 60_000 },
    );
    await eventually(
      "its agent has removed the old container",
      async () => {
        const { items } = await admin.get("/api/v1/events?type=container.orphan-removed&limit=10");
        return items.some((event: Json) => event.server_id === back.id);
      },
      { timeoutMs: 60_000 },
    );
    const gpus = async (): Promise<Json[]> => (await admin.get(`/api/v1/gpus?server_id=${back.id}`)).items;
    const [gpu] = await eventually("its GPU is seen", async () => {
      const found = await gpus();
      return found.length === 1 && found;
    });
    const next = await api.post("/api/v1/allocations", {
      gpus: { count: 1 },
      container: { image: "sim/train:1" },
      lease_seconds: 3600,
    });
    const nextPath = `/api/v1/allocations/${next.id}`;
    await eventually("the scheduler has said why it waits", async () => {
      const { state, message } = await api.get(nextPath);
      return state === "queued" && message !== "" && message !== next.message;
    });
    await admin.patch(`/api/v1/gpus/${gpu.id}`, { scheduling: { schedulable: true, reason: "" } });
    await eventually(
      "it runs once an operator said so",
      async () => (await api.get(nextPath)).state === "active",
      {
        timeoutMs: 60_000,
      },
    );
  });
});
