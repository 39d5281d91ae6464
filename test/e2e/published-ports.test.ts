import { execFileSync } from "node:child_process";
import { mkdirSync } from "node:fs";
import { join } from "node:path";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import type { Json } from "../../packages/simulator/src/cluster/api.ts";
import { eventually } from "../../packages/simulator/src/cluster/eventually.ts";
import { isAvailable, startDockerEngine, type TestDockerEngine } from "../support/docker-engine.ts";
import { startPlatform, untilState, type TestPlatform } from "../support/platform.ts";

const engineStart = await startDockerEngine({ bridge: true });
const unavailable = isAvailable(engineStart) ? undefined : engineStart.unavailable;

const fetchScript =
  "fetch(process.argv[1], { signal: AbortSignal.timeout(5000) }).then((answer) => answer.text()).then((text) => process.stdout.write(text))";

function portOf(allocation: Json): number {
  expect(allocation.observed.ports).toHaveLength(1);
  expect(allocation.observed.ports[0]).toMatchObject({ container_port: 8080, protocol: "tcp" });
  return allocation.observed.ports[0].host_port;
}

describe.skipIf(unavailable !== undefined)(
  `published ports on a real Docker Engine with a bridge${unavailable === undefined ? "" : ` (skipped: ${unavailable})`}`,
  () => {
    let engine: TestDockerEngine;
    let platform: TestPlatform;
    let tenant: Awaited<ReturnType<TestPlatform["tenant"]>>;

    beforeAll(async () => {
      if (!isAvailable(engineStart)) return;
      engine = engineStart;
      await engine.importBusyboxImage("web");
      platform = await startPlatform();
      // Character devices that do nothing stand for the GPUs' nodes: 1:3 is /dev/null.
      const deviceDir = join(platform.directory, "dev");
      mkdirSync(deviceDir);
      for (const name of ["nvidia0", "nvidia1", "nvidiactl"]) {
        execFileSync("mknod", [join(deviceDir, name), "c", "1", "3"]);
      }
      await platform.addHost({
        name: "publishing",
        model: "l40s",
        count: 2,
        env: () => ({
          DOCKER_HOST: `unix://${engine.socketPath}`,
          PALEBLUEDOT_GPU_MODE: "device-nodes",
          PALEBLUEDOT_DEVICE_DIR: deviceDir,
          PALEBLUEDOT_PUBLISH_ADDRESS: "127.0.0.1",
        }),
      });
      tenant = await platform.tenant("webmaster");
    });
    afterAll(async () => {
      await platform?.[Symbol.asyncDispose]();
      await engine?.stop();
    });

    /** A web server whose page is `text`. */
    async function serve(text: string, port: Json): Promise<Json> {
      const accepted = await tenant.api.post("/api/v1/allocations", {
        gpus: { count: 1 },
        container: {
          image: "web",
          pull_policy: "never",
          command: ["sh", "-c"],
          args: ["mkdir /tmp/www && echo $PAGE >/tmp/www/index.html && exec httpd -f -p 8080 -h /tmp/www"],
          environment: { PAGE: text },
          ports: [port],
          stop_grace_seconds: 0,
        },
        lease_seconds: 600,
      });
      return untilState(tenant.api, accepted.id, "active");
    }

    const fetchInside = (port: number): Promise<string> =>
      engine.inNetwork?.(process.execPath, ["-e", fetchScript, `http://127.0.0.1:${port}/`]) ??
      Promise.reject(new Error("the engine has no network of its own"));

    it("serves each container at the host port that its allocation tells, and no longer after the release", async () => {
      const chosen = await serve("fixed", { container_port: 8080, host_port: 18_080, protocol: "tcp" });
      const given = await serve("any", { container_port: 8080, protocol: "tcp" });
      expect(portOf(chosen)).toBe(18_080);
      expect(portOf(given)).toBeGreaterThan(0);
      expect(portOf(given)).not.toBe(18_080);

      for (const [allocation, page] of [
        [chosen, "fixed"],
        [given, "any"],
      ] as const) {
        // Active means that the process was started; httpd may need a moment to listen.
        const text = await eventually(`the page ${page}`, () => fetchInside(portOf(allocation)));
        expect(text.trim()).toBe(page);
      }

      await tenant.api.delete(`/api/v1/allocations/${chosen.id}`);
      await untilState(tenant.api, chosen.id, "ended");
      await expect(fetchInside(18_080)).rejects.toThrow(/ECONNREFUSED/);
      expect((await fetchInside(portOf(given))).trim()).toBe("any");
      await tenant.api.delete(`/api/v1/allocations/${given.id}`);
      await untilState(tenant.api, given.id, "ended");
    });
  },
);
