import {
  Condition_Status,
  type Condition,
} from "@palebluedot/shared/generated/palebluedot/agent/v1/agent.ts";
import type { Clock } from "@palebluedot/shared/clock.ts";

/** The conditions of this host's GPU stack, each with the time since when it holds. */
export interface ConditionSet {
  /** True when status or reason changed; a new message alone keeps `since`. */
  set(component: string, status: Condition_Status, reason: string, message: string): boolean;
  get(component: string): Condition | undefined;
  list(): readonly Condition[];
}

export function createConditionSet(clock: Clock): ConditionSet {
  const conditions = new Map<string, Condition>();
  return {
    set: (component, status, reason, message) => {
      const before = conditions.get(component);
      const same = before?.status === status && before.reason === reason;
      conditions.set(component, {
        component,
        status,
        reason,
        message,
        sinceUnixMs: same ? before.sinceUnixMs : clock.now(),
      });
      return !same;
    },
    get: (component) => conditions.get(component),
    list: () => [...conditions.values()],
  };
}

export const { OK, DEGRADED, FAILED, UNKNOWN, ABSENT } = Condition_Status;
