import { fullJitterMs } from "@palebluedot/shared/backoff.ts";
import { errorMessage, isPlatformError } from "@palebluedot/shared/errors.ts";
import {
  WorkloadDesired_Target,
  WorkloadObserved,
  WorkloadObserved_Phase as Phase,
  type WorkloadDesired,
} from "@palebluedot/shared/generated/palebluedot/agent/v1/agent.ts";
import { specHash } from "../containers/create-request.ts";
import { again, settled, type Next, type WorkloadContext, type WorkloadState } from "./context.ts";
import { reclaimPass } from "./reclaim-pass.ts";
import { emptyRecord, type WorkloadRecord } from "./records.ts";
import { runPass } from "./run-pass.ts";

/** One workload's loop. Single flight: passes of one workload never overlap, other workloads go on meanwhile. */
export interface Workload {
  readonly observed: () => WorkloadObserved;
  readonly desired: () => WorkloadDesired;
  /** A new wish. Ends what the old one was waiting for (a pull, a back-off). */
  revise(desired: WorkloadDesired): void;
  /** Something happened: look now. */
  kick(): void;
  /** The engine answers again: what it refused before it went away does not count. */
  engineReturned(): void;
  /** Ends the loop after the step that is under way; the container stays. */
  stop(): Promise<void>;
}

/** The record of the last run of the agent, as far as it still holds for this wish. */
function restoredRecord(stored: WorkloadRecord | undefined, desired: WorkloadDesired): WorkloadRecord {
  const hash = specHash(desired);
  const reclaimed = desired.target === WorkloadDesired_Target.RECLAIMED;
  // Nothing is known of a workload that is first seen when it is to be reclaimed: it may have run.
  if (!stored) return emptyRecord(hash, reclaimed ? desired.gpuUuids : []);
  return stored.specHash === hash || reclaimed ? stored : emptyRecord(hash, stored.gpuUuids);
}

/** What was last told, as far as it may be claimed without looking. */
function restoredPicture(desired: WorkloadDesired, record: WorkloadRecord): WorkloadObserved {
  const told = WorkloadObserved.decode(Buffer.from(record.observed, "base64"));
  // Clean stays clean while it is to be reclaimed: it was verified, and nothing was started since.
  const stale = told.phase === Phase.CLEAN && desired.target !== WorkloadDesired_Target.RECLAIMED;
  const phase = told.phase === Phase.UNSPECIFIED || stale ? Phase.ACCEPTED : told.phase;
  return { ...told, allocationId: desired.allocationId, phase };
}

export function createWorkload(options: {
  readonly desired: WorkloadDesired;
  readonly context: WorkloadContext;
  /** The observed picture changed. */
  readonly onChanged: () => void;
  /** Reclaimed and clean; called after every pass that finds it so. */
  readonly onClean: () => void;
  /** The engine did not answer. */
  readonly onDoubt: () => void;
}): Workload {
  const { context } = options;
  const { allocationId } = options.desired;
  const firstHash = specHash(options.desired);
  const record = restoredRecord(context.records.get(allocationId), options.desired);
  // Before any pass of any workload: nobody else gets a GPU that this one may have left something on.
  context.gate.adopt(allocationId, record.gpuUuids);
  const state: WorkloadState = {
    allocationId,
    desired: options.desired,
    hash: firstHash,
    record,
    observed: restoredPicture(options.desired, record),
    attempts: 0,
    missingSinceUnixMs: undefined,
    verifyingSinceUnixMs: undefined,
    restartDue: undefined,
    report(change) {
      const next = { ...state.observed, ...change };
      const encoded = Buffer.from(WorkloadObserved.encode(next).finish());
      if (encoded.equals(WorkloadObserved.encode(state.observed).finish())) return;
      if (next.phase !== state.observed.phase) {
        context.log.info(
          {
            allocationId,
            from: phaseName(state.observed.phase),
            to: phaseName(next.phase),
            reason: next.reason,
          },
          "workload phase",
        );
      }
      state.observed = next;
      state.remember({
        observed: encoded.toString("base64"),
      });
      options.onChanged();
    },
    remember(change) {
      state.record = { ...state.record, ...change };
      context.records.set(allocationId, state.record);
    },
  };

  let stopped = false;
  let kicked = false;
  let wake: (() => void) | undefined;
  let pass = new AbortController();
  let failures = 0;

  async function onePass(): Promise<Next> {
    const facts = context.facts();
    // Not even looked at while the engine is away: every phase stays what it last was.
    if (!facts) return settled;
    try {
      const next =
        state.desired.target === WorkloadDesired_Target.RECLAIMED
          ? await reclaimPass(state, context)
          : await runPass(state, context, facts, pass.signal);
      failures = 0;
      return next;
    } catch (error) {
      if (pass.signal.aborted) return again(0);
      failures += 1;
      context.log.warn(
        { allocationId, reason: errorMessage(error), ...(isPlatformError(error) ? {} : { error }) },
        "a step of this workload did not succeed; it is tried again",
      );
      if (isPlatformError(error) && error.code === "container-engine-unavailable") options.onDoubt();
      const { retryBaseMs } = context.timings;
      return again(
        50 + fullJitterMs(failures, { baseMs: retryBaseMs, capMs: retryBaseMs * 30 }, context.random),
      );
    }
  }

  async function loop(): Promise<void> {
    while (!stopped) {
      kicked = false;
      pass = new AbortController();
      const next = await onePass();
      if (next.kind === "clean") options.onClean();
      const waitMs =
        next.kind === "again"
          ? Math.min(next.afterMs, context.timings.resyncMs)
          : context.timings.resyncMs * (0.75 + context.random() / 2);
      await pause(waitMs);
    }
  }

  async function pause(waitMs: number): Promise<void> {
    if (kicked || stopped) return;
    const over = new AbortController();
    await Promise.race([
      context.clock.sleep(waitMs, over.signal).catch(() => undefined),
      new Promise<void>((resolve) => (wake = resolve)),
    ]);
    over.abort(new Error("woken"));
  }

  const looping = loop();
  const kick = (): void => {
    kicked = true;
    wake?.();
  };
  return {
    observed: () => state.observed,
    desired: () => state.desired,
    revise(desired) {
      const hash = specHash(desired);
      if (hash === state.hash && desired.target === state.desired.target) {
        // Only the registry password can differ.
        state.desired = desired;
        kick();
        return;
      }
      const reclaimed = desired.target === WorkloadDesired_Target.RECLAIMED;
      if (hash !== state.hash && !reclaimed) {
        state.hash = hash;
        state.remember(emptyRecord(hash, state.record.gpuUuids));
      }
      state.desired = desired;
      state.attempts = 0;
      state.missingSinceUnixMs = undefined;
      state.verifyingSinceUnixMs = undefined;
      state.restartDue = undefined;
      if (!reclaimed && state.observed.phase === Phase.CLEAN) {
        // Wanted again after it was reclaimed: it begins anew.
        state.remember(emptyRecord(hash, state.record.gpuUuids));
        state.report({
          phase: Phase.ACCEPTED,
          startedAtUnixMs: 0,
          restartCount: 0,
          exitCode: undefined,
          oomKilled: false,
          outputTail: undefined,
        });
      }
      pass.abort(new Error("the desired state changed"));
      kick();
    },
    kick,
    engineReturned() {
      state.attempts = 0;
      kick();
    },
    async stop() {
      stopped = true;
      pass.abort(new Error("the agent stops"));
      kick();
      await looping;
    },
  };
}

const phaseName = (phase: WorkloadObserved["phase"]): string =>
  Object.entries(Phase).find(([, value]) => value === phase)?.[0] ?? String(phase);
