import type { Clock } from "@palebluedot/shared/clock.ts";
import type { Logger } from "@palebluedot/shared/logger.ts";
import type { GpuReading } from "./reading.ts";
import type { SmiRunnerOptions } from "./smi-runner.ts";
import type { GpuMonitor } from "./types.ts";

export interface GpuMonitorOptions {
  /** "nvidia-smi" (found in PATH) or a path. */
  readonly nvidiaSmiPath: string;
  readonly log: Logger;
  /** Fast loop; at least 1000. Default 10,000. */
  readonly intervalMs?: number | undefined;
  /** Slow loop. Default 300,000. */
  readonly slowIntervalMs?: number | undefined;
  /** A log file or /dev/kmsg; undefined: Xids are not seen. */
  readonly kernelLogPath?: string | undefined;
  /** Remembers idle memory levels and the kernel log's position; undefined: nothing survives a restart. */
  readonly stateDir?: string | undefined;
  readonly clock?: Clock | undefined;
  readonly random?: (() => number) | undefined;
  readonly sysfsRoot?: string | undefined;
  readonly procRoot?: string | undefined;
  readonly env?: Readonly<Record<string, string | undefined>> | undefined;
  /** Of one `-q -x`: without persistence mode it takes 30 s on 8 GPUs. Default 60,000. */
  readonly documentDeadlineMs?: number | undefined;
  /** Of the small queries. Default 30,000. */
  readonly queryDeadlineMs?: number | undefined;
  /** Silence of the fast loop beyond its interval that is taken for a hang. Default 30,000. */
  readonly silenceMs?: number | undefined;
  readonly killGraceMs?: number | undefined;
  readonly kernelLogPollMs?: number | undefined;
  readonly backoff?: { readonly baseMs: number; readonly capMs: number } | undefined;
  readonly kill?: SmiRunnerOptions["kill"];
}

/** Beyond GpuMonitor: what `/metrics` needs. */
export interface GpuMonitorWithReadings extends GpuMonitor {
  readonly intervalMs: number;
  /** Last fast reading per GPU with its time; slow fields are filled in from the last document. */
  latestReadings(): readonly TimedReading[];
  streamRestarts(): number;
  /** Last Xid per GPU UUID since the agent was started. */
  lastXids(): ReadonlyMap<string, number>;
}

export interface TimedReading {
  readonly reading: GpuReading;
  readonly takenAtUnixMs: number;
}
