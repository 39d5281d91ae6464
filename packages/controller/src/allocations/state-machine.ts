import type { AllocationState } from "@palebluedot/shared/vocabulary.ts";

/** What may follow a state, and for how long a thing may stay in it. */
export interface StateRule {
  readonly to: readonly AllocationState[];
  /** Milliseconds; afterwards the reconciler looks at it. Undefined: the lease decides. */
  readonly allowanceMs: number | undefined;
  /** What overstaying means. */
  readonly overdue: "poke-scheduler" | "fail" | "expire" | "alert" | "none";
  /** Counted as occupying its GPUs. */
  readonly holdsClaims: boolean;
}

/**
 * The life of an allocation. Every path that held a claim passes `releasing`, and only a verified clean
 * server leads from there to `ended`, or one that an operator gave up, whose GPUs are held back.
 */
export const allocationStateMachine: Readonly<Record<AllocationState, StateRule>> = {
  queued: { to: ["scheduled", "ended"], allowanceMs: 600_000, overdue: "poke-scheduler", holdsClaims: false },
  scheduled: {
    to: ["provisioning", "active", "releasing"],
    allowanceMs: 300_000,
    overdue: "fail",
    holdsClaims: true,
  },
  provisioning: { to: ["active", "releasing"], allowanceMs: 300_000, overdue: "fail", holdsClaims: true },
  active: { to: ["releasing"], allowanceMs: undefined, overdue: "expire", holdsClaims: true },
  // Never handed on unverified, however long it takes: people are told instead.
  releasing: { to: ["ended"], allowanceMs: 600_000, overdue: "alert", holdsClaims: true },
  ended: { to: [], allowanceMs: undefined, overdue: "none", holdsClaims: false },
};

export const statesWithClaims: readonly AllocationState[] = [
  "scheduled",
  "provisioning",
  "active",
  "releasing",
];

/** The states from which `to` may be entered. */
export function statesBefore(to: AllocationState): AllocationState[] {
  return (Object.keys(allocationStateMachine) as AllocationState[]).filter((state) =>
    allocationStateMachine[state].to.includes(to),
  );
}

/** How often people are told that a release does not get done: doubling, a day at most. */
export function overdueRepeatMs(attempt: number): number {
  const first = allocationStateMachine.releasing.allowanceMs ?? 600_000;
  return Math.min(first * 2 ** Math.min(attempt, 20), 86_400_000);
}
