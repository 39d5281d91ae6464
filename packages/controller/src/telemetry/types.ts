import type { GpuSample } from "@palebluedot/shared/generated/palebluedot/agent/v1/agent.ts";

/** Recent samples in memory, one bounded ring per GPU. Volatile by design: history belongs to Prometheus. */
export interface TelemetryStore {
  append(serverId: string, samples: readonly GpuSample[]): void;
  /** Oldest first, not older than `sinceUnixMs`. Absent fields are undefined, never 0. */
  window(gpuUuid: string, sinceUnixMs: number): GpuSample[];
  latest(gpuUuid: string): GpuSample | undefined;
  /** Drops a GPU's ring (it left the fleet). */
  forget(gpuUuid: string): void;
  /** Drops the rings whose newest sample is older: of servers that have been away since. Returns how many. */
  forgetOlderThan(timeUnixMs: number): number;
}
