import { execFileSync } from "node:child_process";
import { mkdirSync } from "node:fs";
import { join } from "node:path";
import { afterAll, afterEach, beforeAll, describe, expect, it } from "vitest";
import { eventually } from "../../packages/simulator/src/cluster/eventually.ts";
import type { Api, Json } from "../../packages/simulator/src/cluster/api.ts";
import { isAvailable, startDockerEngine, type TestDockerEngine } from "../support/docker-engine.ts";
import { startPlatform, untilState, type TestHost, type TestPlatform } from "../support/platform.ts";

const engineStart = await startDockerEngine();
const unavailable = isAvailable(engineStart) ? undefined : engineStart.unavailable;

/** What a container of ours prints about itself, then it stays. */
const tell = [
  "sh",
  "-c",
  "echo devices $(ls /dev | grep '^nvidia[0-9]' | tr '\\n' ' '); echo visible $NVIDIA_VISIBLE_DEVICES; echo ready; while true; do sleep 1; done",
];

async function allocate(api: Api, count: number): Promise<Json> {
  const accepted = await api.post("/api/v1/allocations", {
    gpus: { count },
    container: { image: "greedy", command: tell, pull_policy: "never", stop_grace_seconds: 0 },
    lease_seconds: 600,
  });
  expect(accepted.state).toBe("queued");
  return untilState(api, accepted.id, "active");
}

async function printed(api: Api, id: string): Promise<string> {
  return eventually("the container has printed all of it", async () => {
    const { body } = await api.request("GET", `/api/v1/allocations/${id}/logs`);
    return String(body).includes("ready") ? String(body) : undefined;
  });
}

function devices(text: string): string[] {
  return /devices (.*)/.exec(text)?.[1]?.trim().split(/\s+/) ?? [];
}

describe.skipIf(unavailable !== undefined)(
  `two tenants on one server with a real Docker Engine${unavailable === undefined ? "" : ` (skipped: ${unavailable})`}`,
  () => {
    let engine: TestDockerEngine;
    let platform: TestPlatform;
    let host: TestHost;

    beforeAll(async () => {
      if (!isAvailable(engineStart)) return;
      engine = engineStart;
      // An image that asks for every GPU, as CUDA base images do.
      await engine.importBusyboxImage("greedy", {
        env: { NVIDIA_VISIBLE_DEVICES: "all", NVIDIA_DRIVER_CAPABILITIES: "all" },
      });
      platform = await startPlatform();
      // Character devices that do nothing stand for the GPUs' nodes: 1:3 is /dev/null.
      const deviceDir = join(platform.directory, "dev");
      mkdirSync(deviceDir);
      for (const name of ["nvidia0", "nvidia1", "nvidia2", "nvidia3", "nvidiactl", "nvidia-uvm"]) {
        execFileSync("mknod", [join(deviceDir, name), "c", "1", "3"]);
      }
      host = await platform.addHost({
        name: "real-engine",
        model: "l40s",
        count: 4,
        env: () => ({
          DOCKER_HOST: `unix://${engine.socketPath}`,
          PALEBLUEDOT_GPU_MODE: "device-nodes",
          PALEBLUEDOT_DEVICE_DIR: deviceDir,
          PALEBLUEDOT_CONTAINER_NETWORK: "none",
        }),
      });
    });
    afterAll(async () => {
      await platform?.[Symbol.asyncDispose]();
      await engine?.stop();
    });
    const left = async (): Promise<Json[]> =>
      (await platform.admin.get("/api/v1/allocations?limit=500")).items.filter(
        (each: Json) => each.state !== "ended",
      );
    // A test that failed half way must not take the GPUs of the next one.
    afterEach(async () => {
      for (const each of await left()) await platform.admin.delete(`/api/v1/allocations/${each.id}`);
      await eventually("nothing is left", async () => (await left()).length === 0, { timeoutMs: 60_000 });
    });

    it("gives each tenant its own devices and nothing of the other, and frees exactly what is released", async () => {
      const red = await platform.tenant("red");
      const blue = await platform.tenant("blue");
      const redAllocation = await allocate(red.api, 1);
      const blueAllocation = await allocate(blue.api, 2);

      const redSees = devices(await printed(red.api, redAllocation.id));
      const blueSees = devices(await printed(blue.api, blueAllocation.id));
      expect(redSees).toEqual(redAllocation.gpus.map((gpu: Json) => `nvidia${gpu.index}`));
      expect(blueSees.toSorted()).toEqual(
        blueAllocation.gpus.map((gpu: Json) => `nvidia${gpu.index}`).toSorted(),
      );
      expect(new Set([...redSees, ...blueSees]).size).toBe(3);
      // The image says "all"; the runtime must not hear it.
      expect(await printed(red.api, redAllocation.id)).toContain("visible void");

      // Neither tenant can see, read or end what is the other's.
      for (const [method, path] of [
        ["GET", ""],
        ["GET", "/logs"],
        ["DELETE", ""],
        ["POST", "/extend"],
      ] as const) {
        const body = method === "POST" ? { extend_seconds: 60 } : undefined;
        const answer = await blue.api.request(method, `/api/v1/allocations/${redAllocation.id}${path}`, body);
        expect([method, path, answer.status]).toEqual([method, path, 404]);
      }
      expect((await blue.api.get("/api/v1/allocations")).items.map((item: Json) => item.id)).toEqual([
        blueAllocation.id,
      ]);

      await red.api.delete(`/api/v1/allocations/${redAllocation.id}`);
      await untilState(red.api, redAllocation.id, "ended");
      const { items: claimed } = await platform.admin.get(
        `/api/v1/gpus?server_id=${host.serverId}&state=claimed`,
      );
      expect(claimed.map((gpu: Json) => gpu.index).toSorted()).toEqual(
        blueAllocation.gpus.map((gpu: Json) => gpu.index).toSorted(),
      );
      expect((await blue.api.get(`/api/v1/allocations/${blueAllocation.id}`)).state).toBe("active");
      await blue.api.delete(`/api/v1/allocations/${blueAllocation.id}`);
      await untilState(blue.api, blueAllocation.id, "ended");
    });

    it("makes what does not fit wait, says why, and starts it when something is free", async () => {
      const green = await platform.tenant("green");
      const first = await allocate(green.api, 3);
      const second = await green.api.post("/api/v1/allocations", {
        gpus: { count: 2 },
        container: { image: "greedy", command: tell, pull_policy: "never", stop_grace_seconds: 0 },
      });
      const waiting = await eventually("it says why it waits", async () => {
        const seen = await green.api.get(`/api/v1/allocations/${second.id}`);
        return seen.message.includes("free") ? seen : undefined;
      });
      expect(waiting.state).toBe("queued");
      expect(waiting.message).toMatch(/\b2\b/);
      await green.api.delete(`/api/v1/allocations/${first.id}`);
      const started = await untilState(green.api, second.id, "active");
      expect(started.gpus).toHaveLength(2);
      await green.api.delete(`/api/v1/allocations/${second.id}`);
      await untilState(green.api, second.id, "ended");
    });

    it("adopts a running container when the agent was killed, and does not restart it", async () => {
      const tenant = await platform.tenant("patient");
      const allocation = await allocate(tenant.api, 1);
      const { container_id: containerId, started_at: startedAt } = allocation.observed;
      await host.agent.kill();
      const connected = async (): Promise<boolean> =>
        (await platform.admin.get(`/api/v1/servers/${host.serverId}`)).connected;
      await eventually("the controller sees that the agent is gone", async () => !(await connected()));
      host.agent = host.agent.restart();
      await eventually("the agent is back", connected);
      const seen = await tenant.api.get(`/api/v1/allocations/${allocation.id}`);
      expect(seen.state).toBe("active");
      expect(seen.observed.container_id).toBe(containerId);
      expect(seen.observed.started_at).toBe(startedAt);
      expect(await engine.api("GET", `/containers/${containerId}/json`)).toMatchObject({
        State: { Running: true },
        RestartCount: 0,
      });
      await tenant.api.delete(`/api/v1/allocations/${allocation.id}`);
      await untilState(tenant.api, allocation.id, "ended");
      await expect(engine.api("GET", `/containers/${containerId}/json`)).rejects.toThrow(
        /No such container/i,
      );
    });

    it("keeps a GPU that is not clean, and names what holds it", async () => {
      const tenant = await platform.tenant("untidy");
      const allocation = await allocate(tenant.api, 1);
      const gpu = allocation.gpus[0];
      const { addGpuProcess, removeGpuProcess } = await import("../../packages/simulator/src/server.ts");
      addGpuProcess(host.server.stateDir, gpu.index, {
        pid: 4_000_001,
        name: "left-behind",
        memoryMib: 3000,
        utilization: 0,
        stuck: true,
      });
      await tenant.api.delete(`/api/v1/allocations/${allocation.id}`);
      const dirty = await eventually(
        "it is reported dirty",
        async () => {
          const seen = await tenant.api.get(`/api/v1/allocations/${allocation.id}`);
          expect(seen.state).not.toBe("ended");
          return seen.observed.phase === "dirty" ? seen : undefined;
        },
        { timeoutMs: 90_000, intervalMs: 500 },
      );
      expect(JSON.stringify(dirty.observed.holders)).toContain("left-behind");
      const { items } = await platform.admin.get(`/api/v1/gpus?server_id=${host.serverId}&state=claimed`);
      expect(items.map((item: Json) => item.uuid)).toEqual([gpu.uuid]);
      removeGpuProcess(host.server.stateDir, gpu.index, 4_000_001);
      await untilState(tenant.api, allocation.id, "ended");
    });

    it("refuses what would leave the container, in words", async () => {
      const tenant = await platform.tenant("curious");
      for (const [extra, reason] of [
        [{ privileged: true }, "refused-privileged"],
        [{ host_network: true }, "refused-host-network"],
        [{ added_capabilities: ["SYS_ADMIN"] }, "refused-capability"],
        [{ volumes: [{ name: "etc", mount_path: "/x", host_path: "/etc" }] }, "refused-host-path"],
        [{ host_devices: ["/dev/kmsg"] }, "refused-device"],
      ] as const) {
        const accepted = await tenant.api.request("POST", "/api/v1/allocations", {
          gpus: { count: 1 },
          container: { image: "greedy", command: tell, pull_policy: "never", ...extra },
        });
        expect(accepted.status).toBe(202);
        const ended = await untilState(tenant.api, accepted.body.id, "ended");
        expect(ended.end_reason).toBe("failed");
        expect(`${ended.observed.reason} ${ended.message}`).toContain(reason);
      }
    });
  },
);
