import type { Logger } from "@palebluedot/shared/logger.ts";
import { PlatformError } from "@palebluedot/shared/errors.ts";
import { serverStates, type ServerState } from "@palebluedot/shared/vocabulary.ts";
import type { ISql } from "postgres";
import { Counter, Histogram, type Registry } from "prom-client";
import { appendEvents } from "../events/outbox.ts";

/** Where a server may go from each state. Staying put is always allowed and writes nothing. */
export const serverTransitions: Readonly<Record<ServerState, readonly ServerState[]>> = {
  // waits for an operator's approval, or for its agent to enrol
  pending: ["verifying", "retired"],
  // approved; waits for its first inventory
  verifying: ["available", "maintenance", "failed", "retired"],
  available: ["verifying", "deploying", "in_use", "cleaning", "maintenance", "failed", "retired"],
  deploying: ["available", "in_use", "cleaning", "maintenance", "failed"],
  in_use: ["cleaning", "maintenance", "failed"],
  cleaning: ["available", "deploying", "maintenance", "failed"],
  maintenance: ["verifying", "available", "cleaning", "failed", "retired"],
  failed: ["verifying", "cleaning", "maintenance", "retired"],
  retired: ["pending"],
};

export interface ServerTransition {
  readonly serverId: string;
  readonly to: ServerState;
  readonly message: string;
  /** "system", "agent:<server id>", "token:<token id>" */
  readonly actor: string;
  /** Only from these; default: every state that allows it. */
  readonly from?: readonly ServerState[];
}

export interface ServerStates {
  /**
   * Moves a server inside the caller's transaction, with its event. Returns the state it was in, or undefined
   * when it was not in an allowed one (the caller decides whether that is an error): calling twice is safe.
   */
  transition(tx: ISql, change: ServerTransition): Promise<ServerState | undefined>;
}

/** The only writer of `servers.state`: it also logs, counts and times each transition. */
export function createServerStates(deps: { readonly log: Logger; readonly metrics: Registry }): ServerStates {
  const transitions = counter(deps.metrics);
  const durations = histogram(deps.metrics);
  return {
    async transition(tx, change) {
      const from = (change.from ?? serverStates).filter((state) =>
        serverTransitions[state].includes(change.to),
      );
      if (from.length === 0) {
        throw new PlatformError({
          code: "server-transition-unknown",
          kind: "internal",
          message: `no state leads to ${change.to} from ${(change.from ?? []).join(", ")}`,
        });
      }
      const [row] = await tx<{ name: string; old_state: ServerState; seconds: number }[]>`
        with old as (
          select id, state, state_since from servers where id = ${change.serverId} and state = any(${from}) for update
        )
        update servers s
        set state = ${change.to}, state_since = now(), state_message = ${change.message}, updated_at = now()
        from old where s.id = old.id
        returning s.name, old.state as old_state, extract(epoch from now() - old.state_since)::float8 as seconds`;
      if (row === undefined) return undefined;
      await appendEvents(tx, [
        {
          type: `server.${change.to.replaceAll("_", "-")}`,
          severity: change.to === "failed" ? "error" : "info",
          serverId: change.serverId,
          actor: change.actor,
          message: change.message,
          data: { from: row.old_state, to: change.to, name: row.name },
        },
      ]);
      transitions.inc({ from: row.old_state, to: change.to });
      durations.observe({ state: row.old_state }, Math.max(0, row.seconds));
      deps.log.info(
        { server_id: change.serverId, from: row.old_state, to: change.to, actor: change.actor },
        "server changed state",
      );
      return row.old_state;
    },
  };
}

// Several features build their own writer over the same registry.
function counter(registry: Registry): Counter<"from" | "to"> {
  const name = "palebluedot_server_transitions_total";
  return (
    (registry.getSingleMetric(name) as Counter<"from" | "to"> | undefined) ??
    new Counter({
      name,
      help: "Server state transitions",
      labelNames: ["from", "to"],
      registers: [registry],
    })
  );
}

function histogram(registry: Registry): Histogram<"state"> {
  const name = "palebluedot_server_state_duration_seconds";
  return (
    (registry.getSingleMetric(name) as Histogram<"state"> | undefined) ??
    new Histogram({
      name,
      help: "How long servers stayed in a state before they left it",
      labelNames: ["state"],
      buckets: [1, 10, 60, 600, 3600, 86_400, 604_800],
      registers: [registry],
    })
  );
}
