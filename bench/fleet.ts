import { parseArgs } from "node:util";
import { setTimeout as sleep } from "node:timers/promises";
import type { Bench } from "./main.ts";
import { cpuSeconds, descendants, progress, report, rssMib } from "./measure.ts";
import { startBenchPlatform } from "./platform.ts";

/** A connected fleet that only sends telemetry: what does watching cost the controller? */
export const fleetBench: Bench = {
  summary: "--agents N [--interval-ms 10000] [--seconds 60]: cost of a connected fleet",
  async run(args) {
    const { values } = parseArgs({
      args: [...args],
      options: {
        agents: { type: "string", default: "1000" },
        "interval-ms": { type: "string", default: "10000" },
        seconds: { type: "string", default: "60" },
      },
    });
    const agents = Number(values.agents);
    const intervalMs = Number(values["interval-ms"]);
    const seconds = Number(values.seconds);
    await using platform = await startBenchPlatform({ agents, telemetryIntervalMs: intervalMs });
    const extra = { agents, interval_ms: intervalMs };
    report("fleet", "join", platform.joinSeconds, "s", extra);
    report("fleet", "join_rate", agents / platform.joinSeconds, "agents/s", extra);

    progress(`measuring for ${seconds} s ...`);
    const pid = platform.controller.pid;
    const databasePids = (): number[] => [platform.postgresPid, ...descendants(platform.postgresPid)];
    const databaseCpu = (): number => databasePids().reduce((sum, each) => sum + safeCpu(each), 0);
    const before = {
      cpu: cpuSeconds(pid),
      database: databaseCpu(),
      sent: platform.fleet.statistics().telemetryMessages,
      at: performance.now(),
    };
    let peakRss = 0;
    for (let second = 0; second < seconds; second += 1) {
      await sleep(1000);
      peakRss = Math.max(peakRss, rssMib(pid));
    }
    const elapsed = (performance.now() - before.at) / 1000;
    report("fleet", "controller_cpu", (100 * (cpuSeconds(pid) - before.cpu)) / elapsed, "% of a core", extra);
    report(
      "fleet",
      "database_cpu",
      (100 * Math.max(0, databaseCpu() - before.database)) / elapsed,
      "% of a core",
      extra,
    );
    report("fleet", "controller_rss_peak", peakRss, "MiB", extra);
    report(
      "fleet",
      "telemetry",
      (platform.fleet.statistics().telemetryMessages - before.sent) / elapsed,
      "messages/s",
      extra,
    );
  },
};

function safeCpu(pid: number): number {
  try {
    return cpuSeconds(pid);
  } catch {
    return 0;
  }
}
