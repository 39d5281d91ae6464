import { writeFileSync } from "node:fs";
import { join } from "node:path";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import type { Json } from "../../packages/simulator/src/cluster/api.ts";
import { eventually } from "../../packages/simulator/src/cluster/eventually.ts";
import { startPart } from "../../packages/simulator/src/cluster/process.ts";
import { startPlatform, type TestPlatform } from "../support/platform.ts";

describe("simulated hosts at a real controller", () => {
  let platform: TestPlatform;

  beforeAll(async () => {
    platform = await startPlatform();
  });
  afterAll(async () => {
    await platform?.[Symbol.asyncDispose]();
  });

  it("are what their own sysfs tree says, not the machine that the test runs on", async () => {
    const host = await platform.addHost({
      name: "made-up",
      model: "h100",
      count: 8,
      env: (server) => ({ DOCKER_HOST: `unix://${join(server.stateDir, "no-engine.sock")}` }),
    });
    const { inventory } = await platform.admin.get(`/api/v1/servers/${host.serverId}`);
    const text = JSON.stringify(inventory);
    for (const address of host.server.identity.mac_addresses) expect(text).toContain(address);
    expect(inventory).toMatchObject({ numa_nodes: 2 });
    expect(inventory.network_interfaces.map((nic: Json) => nic.name)).toEqual(["eth0", "eth1"]);
  });

  it("can be many: the fleet command brings up as many servers as it is told", async () => {
    const tokenFile = join(platform.directory, "fleet-token");
    writeFileSync(tokenFile, `${await platform.joinToken()}\n`, { mode: 0o600 });
    const fleet = startPart(
      "simulator",
      [
        "fleet",
        `--controller=${platform.controller.enrolmentEndpoint}`,
        `--ca-fingerprint=${platform.controller.caFingerprint}`,
        `--join-token-file=${tokenFile}`,
        "--agents=12",
        "--gpus=4",
        "--telemetry-interval-ms=1000",
      ],
      { env: {}, logFile: join(platform.directory, "fleet.log") },
    );
    platform.defer(() => fleet.kill());
    await eventually(
      "twelve more servers are available",
      async () => {
        if (!fleet.isRunning()) throw new Error(fleet.logTail());
        const { items } = await platform.admin.get("/api/v1/servers?state=available&limit=500");
        return items.length === 13;
      },
      { timeoutMs: 60_000 },
    );
    // Asked to end, it closes its sessions and succeeds.
    await fleet.stop();
    expect(await fleet.exited).toEqual({ code: 0, signal: null });
  });
});
