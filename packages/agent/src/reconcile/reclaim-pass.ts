import { errorMessage, isPlatformError } from "@palebluedot/shared/errors.ts";
import { WorkloadObserved_Phase as Phase } from "@palebluedot/shared/generated/palebluedot/agent/v1/agent.ts";
import { labelNames, readLabels } from "../containers/create-request.ts";
import { safeNamePattern } from "../containers/volumes.ts";
import { readOutputTail } from "./output-tail.ts";
import { again, backOff, type Next, type WorkloadContext, type WorkloadState } from "./context.ts";

/** A reading of the GPUs that takes longer is no reading. */
const holdersDeadlineMs = 60_000;

/**
 * One look at a workload whose tenant is gone, and the next step: stop, remove, delete volumes, verify.
 * CLEAN is said only after all of it was seen done. Calling it twice is safe.
 */
export async function reclaimPass(state: WorkloadState, context: WorkloadContext): Promise<Next> {
  const { client } = context;
  const { allocationId } = state;
  const labels = [`${labelNames.allocation}=${allocationId}`, `${labelNames.owner}=${context.ownerId}`];
  const containers = await client.list(labels);
  if (containers.length > 0) {
    state.verifyingSinceUnixMs = undefined;
    state.report({ phase: Phase.STOPPING, reason: "", message: "", holders: [] });
    for (const container of containers) {
      context.gate.adopt(allocationId, readLabels(container.labels)?.gpuUuids ?? []);
      const grace = state.desired.container?.stopGraceSeconds ?? 0;
      if (container.state === "running") {
        try {
          await client.stop(container.id, Math.min(grace > 0 ? grace : 10, 3600));
        } catch (error) {
          // A stop the engine refuses must not keep the tenant's container: it is removed by force below.
          if (!isPlatformError(error) || error.code !== "container-engine-refused") throw error;
          context.log.warn({ allocationId, reason: errorMessage(error) }, "stop refused, removing by force");
        }
      }
      // An end that was kept already is complete: the container has not run since.
      const kept = container.state === "running" ? undefined : state.observed.outputTail;
      state.report({ outputTail: kept ?? (await readOutputTail(context, container.id)) });
      await client.remove(container.id);
    }
    // Seen gone, not assumed gone. One that is still there (an engine that is removing it, or refuses to)
    // is not asked for again at once.
    state.attempts += 1;
    return state.attempts === 1 ? again(0) : backOff(state, context);
  }
  state.attempts = 0;
  if (state.observed.phase === Phase.CLEAN) return { kind: "clean" };
  if (safeNamePattern.test(allocationId)) {
    try {
      await context.volumes.remove(allocationId);
    } catch (error) {
      return dirty(state, context, "volume-not-deleted", errorMessage(error), []);
    }
  }
  // Those it touched, not those it wanted: while it waited for a GPU another tenant was on that one.
  const gpuUuids = context.gate.heldBy(allocationId);
  if (gpuUuids.length === 0) return clean(state, context);

  state.verifyingSinceUnixMs ??= context.clock.now();
  if (state.observed.phase !== Phase.DIRTY) {
    state.report({ phase: Phase.VERIFYING, reason: "", message: "" });
  }
  const look = await lookAtGpus(context, gpuUuids);
  if (look.kind === "known" && look.holders.length === 0) return clean(state, context);
  const overdue = context.clock.now() - state.verifyingSinceUnixMs >= context.timings.verifyMs;
  if (!overdue && state.observed.phase !== Phase.DIRTY) return again(context.timings.verifyPollMs);
  if (look.kind === "unknown") return dirty(state, context, "gpu-state-unknown", look.reason, []);
  const first = look.holders[0];
  return dirty(
    state,
    context,
    "gpu-not-idle",
    `${look.holders.length} left on the GPUs, the first: ${first?.processName ?? ""} (pid ${first?.pid ?? 0})`,
    look.holders.slice(0, 64),
  );
}

type Look = Awaited<ReturnType<WorkloadContext["gpuMonitor"]["holders"]>>;

const unknown = (reason: string): Look => ({ kind: "unknown", reason });

/** Unknown is an answer; never throws. */
async function lookAtGpus(context: WorkloadContext, gpuUuids: readonly string[]): Promise<Look> {
  const done = new AbortController();
  try {
    return await Promise.race([
      context.gpuMonitor.holders(gpuUuids),
      context.clock
        .sleep(holdersDeadlineMs, done.signal)
        .then(() => unknown("nvidia-smi did not answer in time")),
    ]);
  } catch (error) {
    return unknown(errorMessage(error));
  } finally {
    done.abort(new Error("answered"));
  }
}

function clean(state: WorkloadState, context: WorkloadContext): Next {
  const wasDirty = state.observed.phase === Phase.DIRTY;
  state.verifyingSinceUnixMs = undefined;
  state.remember({ gpuUuids: [] });
  state.report({
    phase: Phase.CLEAN,
    reason: "",
    message: "",
    containerId: "",
    ports: [],
    holders: [],
  });
  context.emit(
    "workload.clean",
    state.allocationId,
    wasDirty ? "everything is clean now" : "container and volumes are gone, GPUs are idle",
    { was_dirty: wasDirty, gpu_uuids: state.desired.gpuUuids },
  );
  context.gate.release(state.allocationId);
  return { kind: "clean" };
}

function dirty(
  state: WorkloadState,
  context: WorkloadContext,
  reason: string,
  message: string,
  holders: WorkloadState["observed"]["holders"],
): Next {
  if (state.observed.phase !== Phase.DIRTY || state.observed.reason !== reason) {
    context.emit("workload.dirty", state.allocationId, message, { reason, holders });
  }
  state.report({ phase: Phase.DIRTY, reason, message, holders: [...holders] });
  return again(context.timings.verifyPollMs * 10);
}
