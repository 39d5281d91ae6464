import { chmodSync, mkdtempSync, readdirSync, readFileSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import { parseArgs } from "node:util";
import { nodeFlags } from "@palebluedot/shared/node-flags.ts";
import { bundleProgram } from "../installers/build.ts";
import { startAgent } from "../packages/simulator/src/cluster/agent.ts";
import type { Api, Json } from "../packages/simulator/src/cluster/api.ts";
import { startController } from "../packages/simulator/src/cluster/controller.ts";
import { eventually } from "../packages/simulator/src/cluster/eventually.ts";
import { startPart } from "../packages/simulator/src/cluster/process.ts";
import { createSimulatedServer } from "../packages/simulator/src/server.ts";
import type { Bench } from "./main.ts";
import { cpuSeconds, descendants, progress, report, rssMib } from "./measure.ts";

const gpuCount = 8;

/**
 * What the agent costs its server: the program as the package ships it (bundle and Node's flags), on a
 * simulated server with 8 GPUs, against a real controller; idle, and with a container on every GPU.
 */
export const agentBench: Bench = {
  summary: "[--seconds 60] [--interval-ms 10000] [--node-flags='...']: cost of one agent on an 8-GPU server",
  async run(args) {
    const { values } = parseArgs({
      args: [...args],
      options: {
        seconds: { type: "string", default: "60" },
        "interval-ms": { type: "string", default: "10000" },
        "node-flags": { type: "string", default: nodeFlags.agent.join(" ") },
      },
    });
    const seconds = Number(values.seconds);
    const intervalMs = Number(values["interval-ms"]);
    const flags = values["node-flags"].split(" ").filter((flag) => flag !== "");
    const directory = mkdtempSync(join(tmpdir(), "palebluedot-bench-"));
    // The embedded database runs as a user of its own, who must be able to pass.
    chmodSync(directory, 0o711);
    const endings: (() => Promise<unknown> | void)[] = [
      () => rmSync(directory, { recursive: true, force: true, maxRetries: 5, retryDelay: 200 }),
    ];
    try {
      progress("building the agent, starting a controller ...");
      const bundle = join(directory, "agent.mjs");
      await bundleProgram("packages/agent/src/main.ts", bundle);
      const controller = await startController({
        dataDir: join(directory, "controller"),
        env: { PALEBLUEDOT_TELEMETRY_INTERVAL_MS: String(intervalMs), PALEBLUEDOT_LOG_LEVEL: "warn" },
      });
      endings.push(() => controller.stop());
      const server = createSimulatedServer({
        dir: join(directory, "server"),
        model: "h100",
        count: gpuCount,
        hostname: "bench",
        sysfs: true,
      });
      const socket = join(directory, "engine.sock");
      const engine = startPart("simulator", ["engine", "--state", server.stateDir, "--socket", socket], {
        env: {},
        logFile: join(directory, "engine.log"),
      });
      endings.push(() => engine.stop());
      const created = await controller.api.post("/api/v1/join-tokens", { name: "bench", auto_approve: true });
      const agent = startAgent({
        dataDir: join(directory, "agent"),
        controller: controller.enrolmentEndpoint,
        caFingerprint: controller.caFingerprint,
        joinToken: created.token,
        program: [process.execPath, ...flags, bundle],
        env: {
          ...server.env,
          DOCKER_HOST: `unix://${socket}`,
          PALEBLUEDOT_TELEMETRY_INTERVAL_MS: String(intervalMs),
        },
      });
      endings.push(() => agent.stop());
      await eventually(
        "the server is available",
        async () => {
          if (!agent.isRunning()) throw new Error(`the agent ended:\n${agent.logTail()}`);
          const { items } = await controller.api.get("/api/v1/servers?state=available");
          return items.length === 1;
        },
        { timeoutMs: 60_000 },
      );
      const extra = { gpus: gpuCount, interval_ms: intervalMs, node_flags: flags.join(" ") };
      // The work of the start (inventory, first look, session) is not the subject.
      await sleep(5000);
      progress(`idle: measuring for ${seconds} s ...`);
      await measure(agent.pid, seconds, { ...extra, containers: 0 });
      await fill(controller.api);
      await sleep(5000);
      progress(`with ${gpuCount} containers: measuring for ${seconds} s ...`);
      await measure(agent.pid, seconds, { ...extra, containers: gpuCount });
    } finally {
      for (const end of endings.toReversed()) await end();
    }
  },
};

/** One container on every GPU. */
async function fill(api: Api): Promise<void> {
  const tenant = await api.post("/api/v1/tenants", { name: "bench" });
  for (let index = 0; index < gpuCount; index += 1) {
    await api.post("/api/v1/allocations", {
      tenant_id: tenant.id,
      gpus: { count: 1 },
      container: { image: "sim/burn" },
      lease_seconds: 3600,
    });
  }
  await eventually(
    "every container runs",
    async () => {
      const { items } = await api.get("/api/v1/allocations?limit=100");
      return items.filter((item: Json) => item.state === "active").length === gpuCount;
    },
    { timeoutMs: 60_000 },
  );
}

async function measure(pid: number, seconds: number, extra: Record<string, unknown>): Promise<void> {
  const before = { cpu: cpuSeconds(pid), children: childrenCpuSeconds(pid), at: performance.now() };
  const rss: number[] = [];
  for (let second = 0; second < seconds; second += 1) {
    await sleep(1000);
    rss.push(rssMib(pid));
  }
  const elapsed = (performance.now() - before.at) / 1000;
  const share = (cpu: number): number => (100 * cpu) / elapsed;
  report("agent", "agent_cpu", share(cpuSeconds(pid) - before.cpu), "% of a core", extra);
  // The simulated tool is a Node program: its cost says nothing about the real one.
  report(
    "agent",
    "simulated_nvidia_smi_cpu",
    share(Math.max(0, childrenCpuSeconds(pid) - before.children)),
    "% of a core",
    extra,
  );
  report("agent", "rss_mean", rss.reduce((sum, each) => sum + each, 0) / rss.length, "MiB", extra);
  report("agent", "rss_peak", Math.max(...rss), "MiB", extra);
  report("agent", "rss_unshared", privateMib(pid), "MiB", extra);
  report("agent", "open_files", readdirSync(`/proc/${pid}/fd`).length, "descriptors", extra);
  report("agent", "threads", readdirSync(`/proc/${pid}/task`).length, "threads", extra);
}

/** Of all children, those that ended included. */
function childrenCpuSeconds(pid: number): number {
  const living = descendants(pid).reduce((sum, child) => {
    try {
      return sum + cpuSeconds(child, { reapedChildren: true });
    } catch {
      // It ended while we looked, and counts as reaped by the next look.
      return sum;
    }
  }, 0);
  return living + cpuSeconds(pid, { reapedChildren: true }) - cpuSeconds(pid);
}

/** Without the pages of Node's executable, which other programs of that Node share. */
function privateMib(pid: number): number {
  const rollup = readFileSync(`/proc/${pid}/smaps_rollup`, "utf8");
  const kib = [...rollup.matchAll(/^Private_(?:Clean|Dirty):\s+(\d+) kB$/gm)].map((match) =>
    Number(match[1]),
  );
  return kib.reduce((sum, each) => sum + each, 0) / 1024;
}
