import { Counter, Gauge, Registry } from "prom-client";
import {
  Condition_Status,
  type Condition,
} from "@palebluedot/shared/generated/palebluedot/agent/v1/agent.ts";
import type { Clock } from "@palebluedot/shared/clock.ts";
import type { GpuMonitorWithReadings } from "../gpu/monitor.ts";
import { renderGpuSeries, type AllocationLabels } from "./gpu-series.ts";

export interface MetricsOptions {
  readonly monitor: Pick<
    GpuMonitorWithReadings,
    "latestReadings" | "lastXids" | "snapshot" | "streamRestarts" | "intervalMs"
  >;
  readonly clock: Clock;
  readonly hostname: string;
  readonly agentVersion: string;
  /** Conditions beside the monitor's: the container engine's. */
  readonly conditions?: (() => readonly Condition[]) | undefined;
  /** Who holds a GPU now; undefined: nobody. */
  readonly allocationOf?: ((gpuUuid: string) => AllocationLabels | undefined) | undefined;
  /** Whether the control stream is up; undefined: not told. */
  readonly connected?: (() => boolean) | undefined;
}

export interface AgentMetrics {
  /** Prometheus text format 0.0.4. Answers from memory: a scrape never starts nvidia-smi. */
  render(): Promise<string>;
  /** For other parts' series. */
  readonly registry: Registry;
  countScrape(): void;
}

/** A reading older than this many intervals is no statement about now: its series disappear. */
const staleIntervals = 3;

export function createMetrics(options: MetricsOptions): AgentMetrics {
  const { monitor, clock } = options;
  const registry = new Registry();
  const scrapes = new Counter({
    name: "palebluedot_agent_scrapes_total",
    help: "Answered scrapes.",
    registers: [registry],
  });
  gaugeOf(registry, "palebluedot_agent_resident_memory_bytes", "Resident memory of the agent.", () =>
    process.memoryUsage.rss(),
  );
  gaugeOf(registry, "palebluedot_agent_uptime_seconds", "Time since the agent was started.", () =>
    process.uptime(),
  );
  gaugeOf(registry, "palebluedot_agent_cpu_seconds", "CPU time of the agent, user and system.", () => {
    const { user, system } = process.cpuUsage();
    return (user + system) / 1e6;
  });
  gaugeOf(
    registry,
    "palebluedot_agent_nvidia_smi_restarts",
    "Times that the long-lived nvidia-smi ended and was started again.",
    () => monitor.streamRestarts(),
  );
  if (options.connected !== undefined) {
    const { connected } = options;
    gaugeOf(registry, "palebluedot_agent_connected", "1 while the control stream is up.", () =>
      Number(connected()),
    );
  }
  new Gauge({
    name: "palebluedot_agent_info",
    help: "Version of the agent.",
    labelNames: ["version"],
    registers: [registry],
  }).set({ version: options.agentVersion }, 1);
  const condition = new Gauge({
    name: "palebluedot_agent_condition",
    help: "1 for the status that holds: ok, degraded, failed, unknown or absent.",
    labelNames: ["component", "status", "reason"],
    registers: [registry],
  });

  return {
    registry,
    countScrape: () => {
      scrapes.inc();
    },
    render: async () => {
      const snapshot = monitor.snapshot();
      condition.reset();
      for (const one of [...snapshot.conditions, ...(options.conditions?.() ?? [])]) {
        const status = statusWord(one.status);
        condition.set({ component: one.component, status, reason: one.reason }, 1);
      }
      const oldest = clock.now() - staleIntervals * monitor.intervalMs;
      const xids = monitor.lastXids();
      const inputs = monitor
        .latestReadings()
        .filter(({ takenAtUnixMs }) => takenAtUnixMs >= oldest)
        .map(({ reading }) => ({
          reading,
          lastXid: xids.get(reading.uuid ?? ""),
          allocation: options.allocationOf?.(reading.uuid ?? ""),
        }))
        .sort((a, b) => (a.reading.index ?? 0) - (b.reading.index ?? 0));
      return `${renderGpuSeries(inputs, options.hostname)}${await registry.metrics()}`;
    },
  };
}

function gaugeOf(registry: Registry, name: string, help: string, read: () => number): void {
  registry.registerMetric(
    new Gauge({
      name,
      help,
      registers: [],
      collect() {
        this.set(read());
      },
    }),
  );
}

function statusWord(status: Condition_Status): string {
  const name = Object.entries(Condition_Status).find(([, value]) => value === status)?.[0];
  return (name ?? "unrecognized").toLowerCase();
}
