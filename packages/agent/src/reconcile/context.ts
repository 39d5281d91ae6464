import { fullJitterMs } from "@palebluedot/shared/backoff.ts";
import type { Clock } from "@palebluedot/shared/clock.ts";
import type {
  WorkloadDesired,
  WorkloadObserved,
} from "@palebluedot/shared/generated/palebluedot/agent/v1/agent.ts";
import type { Logger } from "@palebluedot/shared/logger.ts";
import type { ContainerEngineClient } from "../containers/engine.ts";
import type { VolumeStore } from "../containers/volumes.ts";
import type { EngineFacts } from "./engine-watch.ts";
import type { GpuGate } from "./gpu-gate.ts";
import type { ImageAccess } from "./image-access.ts";
import type { ReconcilerOptions, ReconcilerTimings } from "./options.ts";
import type { RecordStore, WorkloadRecord } from "./records.ts";

/** What every workload's pass works with; built once by the reconciler. */
export interface WorkloadContext {
  readonly client: ContainerEngineClient;
  readonly volumes: VolumeStore;
  readonly images: ImageAccess;
  readonly gate: GpuGate;
  readonly records: RecordStore;
  readonly gpuMonitor: ReconcilerOptions["gpuMonitor"];
  readonly clock: Clock;
  readonly log: Logger;
  readonly random: () => number;
  readonly timings: Required<ReconcilerTimings>;
  readonly ownerId: string;
  readonly network: string;
  readonly allowedRegistries: readonly string[];
  readonly publishAddress: string;
  readonly deviceDir: string;
  readonly facts: () => EngineFacts | undefined;
  readonly incarnation: () => string;
  readonly draining: () => boolean;
  /** The desired state that holds is on disk. While it is not, nothing is begun that a restart would forget. */
  readonly stored: () => boolean;
  readonly emit: (
    type: string,
    allocationId: string,
    message: string,
    data?: Readonly<Record<string, unknown>>,
  ) => void;
}

/** What one pass leaves: nothing to do until something happens, or look again after a while. */
export type Next =
  | { readonly kind: "settled" }
  | { readonly kind: "again"; readonly afterMs: number }
  /** Reclaimed and clean: a workload that is no longer in the document can be forgotten. */
  | { readonly kind: "clean" };

export const settled: Next = { kind: "settled" };
export const again = (afterMs: number): Next => ({ kind: "again", afterMs });

/** A workload as its passes see it. One pass at a time, so its fields need no lock. */
export interface WorkloadState {
  readonly allocationId: string;
  desired: WorkloadDesired;
  hash: string;
  /** Replaced as a whole by `report`. */
  observed: WorkloadObserved;
  record: WorkloadRecord;
  /** Tries in a row of what is being tried now (pull, create, start); not kept over a restart. */
  attempts: number;
  /** When this began to wait for a GPU that is not there. */
  missingSinceUnixMs: number | undefined;
  /** When verification began. */
  verifyingSinceUnixMs: number | undefined;
  /** Earliest restart after the exit with this FinishedAt. */
  restartDue: { readonly exit: string; readonly atUnixMs: number } | undefined;
  /** Merges into `observed`, keeps the record in step and tells listeners when something changed. */
  report(change: Partial<WorkloadObserved>): void;
  /** Changes the record and stores it. */
  remember(change: Partial<WorkloadRecord>): void;
}

/** Waits longer with every attempt of what is being tried now. */
export function backOff(state: WorkloadState, context: WorkloadContext): Next {
  const { retryBaseMs } = context.timings;
  const waitMs = fullJitterMs(
    state.attempts,
    { baseMs: retryBaseMs, capMs: retryBaseMs * 60 },
    context.random,
  );
  return again(waitMs + Math.min(retryBaseMs, 100));
}
