import type { ObservedWorkload } from "@palebluedot/shared/allocation-request.ts";
import { assertNever } from "@palebluedot/shared/errors.ts";
import {
  WorkloadObserved_Phase,
  type WorkloadObserved,
} from "@palebluedot/shared/generated/palebluedot/agent/v1/agent.ts";
import type { AllocationState, EndReason } from "@palebluedot/shared/vocabulary.ts";
import { storableText } from "../events/outbox.ts";
import type { Transition } from "./transitions.ts";

/** What the database holds of an allocation when a report about it arrives. */
export interface ReportedAllocation {
  readonly id: string;
  readonly serverId: string;
  readonly state: AllocationState;
  readonly observed: ObservedWorkload;
  readonly message: string;
}

export interface Verdict {
  readonly transition?: Transition;
  /** Set when it differs from what is stored and no transition carries it. */
  readonly observed?: ObservedWorkload;
  readonly message?: string;
  /** The end of the container's output, when the report has it. */
  readonly outputTail?: Buffer;
  /** Residue was found behind the tenant, which was not known before. */
  readonly dirty?: string;
}

const phaseNames: Readonly<Record<number, string>> = {
  [WorkloadObserved_Phase.ACCEPTED]: "accepted",
  [WorkloadObserved_Phase.PULLING]: "pulling",
  [WorkloadObserved_Phase.CREATING]: "creating",
  [WorkloadObserved_Phase.RUNNING]: "running",
  [WorkloadObserved_Phase.EXITED]: "exited",
  [WorkloadObserved_Phase.FAILED]: "failed",
  [WorkloadObserved_Phase.STOPPING]: "stopping",
  [WorkloadObserved_Phase.VERIFYING]: "verifying",
  [WorkloadObserved_Phase.CLEAN]: "clean",
  [WorkloadObserved_Phase.DIRTY]: "dirty",
};

const maxHolders = 64;
const maxOutputTailBytes = 16 * 1024;
const bounded = (text: string, max: number): string => storableText(text.slice(0, max));

/** The report in the API's words, bounded: an agent is not trusted to be brief. */
export function observedWorkload(report: WorkloadObserved): ObservedWorkload {
  return {
    phase: phaseNames[report.phase] ?? "unknown",
    ...(report.reason === "" ? {} : { reason: bounded(report.reason, 128) }),
    ...(report.message === "" ? {} : { message: bounded(report.message, 2048) }),
    ...(report.containerId === "" ? {} : { container_id: bounded(report.containerId, 128) }),
    ...(report.exitCode === undefined ? {} : { exit_code: report.exitCode }),
    ...(isTime(report.startedAtUnixMs) ? { started_at: new Date(report.startedAtUnixMs).toISOString() } : {}),
    ...(report.restartCount === 0 ? {} : { restart_count: report.restartCount }),
    ...(report.oomKilled ? { oom_killed: true } : {}),
    ...(report.ports.length === 0
      ? {}
      : {
          ports: report.ports.slice(0, 64).map((port) => ({
            container_port: port.containerPort,
            host_port: port.hostPort,
            protocol: bounded(port.protocol, 8),
          })),
        }),
    ...(report.holders.length === 0
      ? {}
      : {
          holders: report.holders.slice(0, maxHolders).map((holder) => ({
            gpu_uuid: bounded(holder.gpuUuid, 96),
            pid: holder.pid,
            process_name: bounded(holder.processName, 256),
            memory_used_bytes: holder.memoryUsedBytes,
          })),
        }),
  };
}

// 2^53 would fit a number but not a Date.
const isTime = (unixMs: number): boolean => unixMs > 0 && unixMs < 8.64e15;

/** Key order of jsonb differs from ours, so objects are compared member by member. */
function sameValue(left: unknown, right: unknown): boolean {
  if (left === right) return true;
  if (typeof left !== "object" || typeof right !== "object" || left === null || right === null) return false;
  const leftKeys = Object.keys(left);
  return (
    leftKeys.length === Object.keys(right).length &&
    leftKeys.every((key) => sameValue(Reflect.get(left, key), Reflect.get(right, key)))
  );
}

const startableStates: readonly AllocationState[] = ["scheduled", "provisioning", "active"];

/**
 * What a report means for an allocation. Pure: the same report twice changes nothing the second time.
 * A report never brings an allocation back: once it is releasing only CLEAN counts.
 */
export function judgeReport(allocation: ReportedAllocation, report: WorkloadObserved): Verdict {
  const verdict = judgePhase(allocation, report);
  const tail = report.outputTail;
  if (tail === undefined || tail.length === 0) return verdict;
  return { ...verdict, outputTail: tail.subarray(-maxOutputTailBytes) };
}

/** How the container ended stays known while what is left of it is cleared away, also from an agent that forgets. */
function exitOf(allocation: ReportedAllocation): ObservedWorkload {
  if (allocation.state !== "releasing") return {};
  const { exit_code, oom_killed } = allocation.observed;
  return {
    ...(exit_code === undefined ? {} : { exit_code }),
    ...(oom_killed === undefined ? {} : { oom_killed }),
  };
}

function judgePhase(allocation: ReportedAllocation, report: WorkloadObserved): Verdict {
  const observed = { ...exitOf(allocation), ...observedWorkload(report) };
  const changed = sameValue(observed, allocation.observed) ? undefined : observed;
  const unchangedState: Verdict = changed === undefined ? {} : { observed: changed };
  const to = (
    from: readonly AllocationState[],
    state: AllocationState,
    message: string,
    more: { endReason?: EndReason; severity?: "warning" } = {},
  ): Verdict => ({
    transition: {
      id: allocation.id,
      serverId: allocation.serverId,
      from,
      to: state,
      message,
      observed,
      actor: `agent:${allocation.serverId}`,
      ...more,
    },
  });
  const releasing = allocation.state === "releasing";

  switch (report.phase) {
    case WorkloadObserved_Phase.ACCEPTED:
    case WorkloadObserved_Phase.PULLING:
    case WorkloadObserved_Phase.CREATING: {
      const message = startingMessage(observed);
      if (allocation.state === "scheduled") return to(["scheduled"], "provisioning", message);
      if (allocation.state === "provisioning" && changed !== undefined) return { observed: changed, message };
      return unchangedState;
    }
    case WorkloadObserved_Phase.RUNNING:
      if (allocation.state === "scheduled" || allocation.state === "provisioning") {
        return to(["scheduled", "provisioning"], "active", "");
      }
      return unchangedState;
    case WorkloadObserved_Phase.EXITED:
      if (releasing) return unchangedState;
      return exitCodeIsSuccess(observed)
        ? to(startableStates, "releasing", "the container ended by itself with exit code 0", {
            endReason: "released",
          })
        : to(startableStates, "releasing", exitMessage(observed), {
            endReason: "failed",
            severity: "warning",
          });
    case WorkloadObserved_Phase.FAILED:
      if (releasing) return unchangedState;
      return to(startableStates, "releasing", failureMessage(observed), {
        endReason: "failed",
        severity: "warning",
      });
    case WorkloadObserved_Phase.CLEAN:
      // Before the release it can only be a report about something else, or a lie.
      return releasing ? to(["releasing"], "ended", withoutResidue(allocation.message)) : {};
    case WorkloadObserved_Phase.DIRTY: {
      if (!releasing || changed === undefined) return unchangedState;
      const residue = dirtyMessage(observed);
      return {
        observed: changed,
        message: `${withoutResidue(allocation.message)}; ${residue}`,
        ...(allocation.observed.phase === "dirty" ? {} : { dirty: residue }),
      };
    }
    case WorkloadObserved_Phase.STOPPING:
    case WorkloadObserved_Phase.VERIFYING:
      return unchangedState;
    case WorkloadObserved_Phase.UNSPECIFIED:
    case WorkloadObserved_Phase.UNRECOGNIZED:
      // A newer agent's phase: nothing is concluded from what is not understood.
      return {};
    default:
      return assertNever(report.phase, "workload phase");
  }
}

function exitCodeIsSuccess(observed: ObservedWorkload): boolean {
  return observed.exit_code === 0 && observed.oom_killed !== true;
}

function detail(observed: ObservedWorkload): string {
  const parts = [observed.message, observed.reason === undefined ? undefined : `(${observed.reason})`];
  return parts.filter((part) => part !== undefined).join(" ");
}

function startingMessage(observed: ObservedWorkload): string {
  const words: Readonly<Record<string, string>> = {
    accepted: "the server has taken the request",
    pulling: "the server is pulling the image",
    creating: "the server is creating the container",
  };
  const what = words[observed.phase ?? ""] ?? "the server is starting the container";
  return observed.message === undefined ? what : `${what}: ${observed.message}`;
}

function exitMessage(observed: ObservedWorkload): string {
  const what =
    observed.oom_killed === true
      ? "the container was killed because it ran out of memory"
      : `the container ended by itself with exit code ${observed.exit_code ?? "unknown"}`;
  const more = detail(observed);
  return more === "" ? what : `${what}: ${more}`;
}

function failureMessage(observed: ObservedWorkload): string {
  const more = detail(observed);
  return more === "" ? "the container could not be started" : `the container could not be started: ${more}`;
}

function dirtyMessage(observed: ObservedWorkload): string {
  const holders = (observed.holders ?? [])
    .slice(0, 4)
    .map((holder) =>
      holder.pid === 0
        ? `${holder.memory_used_bytes} bytes of GPU memory`
        : `process ${holder.pid} (${holder.process_name})`,
    );
  const what = holders.length === 0 ? detail(observed) : holders.join(", ");
  return `${residueWords}${what === "" ? "" : `: ${what}`}`;
}

const residueWords = "the server is not clean yet";

/** Why it ended, without what was still in the way then. */
function withoutResidue(message: string): string {
  return message.split(`; ${residueWords}`)[0] ?? message;
}
