import type { Clock } from "@palebluedot/shared/clock.ts";
import { assertNever } from "@palebluedot/shared/errors.ts";
import type { Logger } from "@palebluedot/shared/logger.ts";
import type { AllocationState } from "@palebluedot/shared/vocabulary.ts";
import type { Sql } from "postgres";
import { appendEvents } from "../events/outbox.ts";
import type { NewEvent } from "../events/types.ts";
import type { DueItem, Outcome, ReconcileHandler } from "../reconciler/reconciler.ts";
import { allocationStateMachine, overdueRepeatMs } from "./state-machine.ts";
import { retryDeadlocks, type Transition, type Transitioned, type TransitionWriter } from "./transitions.ts";

interface DueRow {
  id: string;
  tenant_id: string;
  state: AllocationState;
  state_since: Date;
  server_id: string | null;
  expires_at: Date | null;
  message: string;
  server_name: string | null;
  unreachable: boolean;
  disconnected_at: Date | null;
  phase: string | null;
}

/** The agent is at work that takes as long as the image is large. */
const workingPhases: readonly string[] = ["pulling", "creating"];

/**
 * What happens when an allocation stays in a state for longer than it should: leases expire, starts that
 * take too long fail, and releases that do not come clean are made known (and nothing else: nothing is
 * handed on unverified). Called early or twice it does nothing.
 */
export function createOverdueHandler(options: {
  readonly sql: Sql;
  readonly clock: Clock;
  readonly log: Logger;
  readonly writer: TransitionWriter;
  readonly onTransitioned: (done: readonly Transitioned[]) => void;
  readonly pokeScheduler: () => void;
  /** How long a start may take in all while its agent says that it pulls the image or makes the container. */
  readonly provisioningMs: number;
}): ReconcileHandler {
  const { sql, clock, log, writer } = options;

  async function handle(items: readonly DueItem[]): Promise<ReadonlyMap<string, Outcome>> {
    const outcomes = new Map<string, Outcome>(items.map((item) => [item.key, { kind: "done" }]));
    const rows = await sql<DueRow[]>`
      select allocation.id, allocation.tenant_id, allocation.state, allocation.state_since, allocation.server_id,
        allocation.expires_at, allocation.message, server.name as server_name,
        coalesce(server.conditions ? 'unreachable', false) as unreachable, server.disconnected_at,
        allocation.observed ->> 'phase' as phase
      from allocations allocation left join servers server on server.id = allocation.server_id
      where allocation.id = any(${items.map((item) => item.key)}::uuid[]) and allocation.state <> 'ended'`;
    const attempts = new Map(items.map((item) => [item.key, item.attempt]));
    const transitions: Transition[] = [];
    const events: NewEvent[] = [];
    for (const row of rows) {
      outcomes.set(row.id, judge(row, attempts.get(row.id) ?? 0, transitions, events));
    }
    const done = await retryDeadlocks(() => writer.write(sql, transitions, clock.now()), log);
    await appendEvents(sql, events);
    writer.committed(done);
    options.onTransitioned(done);
    return outcomes;
  }

  function judge(row: DueRow, attempt: number, transitions: Transition[], events: NewEvent[]): Outcome {
    const now = clock.now();
    const rule = allocationStateMachine[row.state];
    const dueAt =
      row.state === "active"
        ? (row.expires_at?.getTime() ?? now)
        : row.state_since.getTime() + (rule.allowanceMs ?? 0);
    if (row.state === "provisioning" && dueAt <= now) {
      const until = workingUntil(row, rule.allowanceMs ?? 0);
      if (until > now) {
        // Looked at again before that: its server may fall silent.
        return { kind: "wait", until: new Date(Math.min(until, now + (rule.allowanceMs ?? 0))) };
      }
    }
    if (dueAt > now) return { kind: "wait", until: new Date(dueAt) };
    switch (rule.overdue) {
      case "poke-scheduler":
        options.pokeScheduler();
        return { kind: "wait", until: new Date(now + (rule.allowanceMs ?? 600_000)) };
      case "fail":
        transitions.push({
          id: row.id,
          from: ["scheduled", "provisioning"],
          to: "releasing",
          serverId: row.server_id,
          endReason: "failed",
          severity: "warning",
          message: startTimeoutMessage(row, now - row.state_since.getTime()),
        });
        return { kind: "moved" };
      case "expire":
        transitions.push({
          id: row.id,
          from: ["active"],
          to: "releasing",
          serverId: row.server_id,
          endReason: "expired",
          message: "the lease ran out",
        });
        return { kind: "moved" };
      case "alert":
        events.push({
          type: "allocation.overdue",
          severity: "error",
          tenantId: row.tenant_id,
          serverId: row.server_id,
          allocationId: row.id,
          message: overdueMessage(row, now),
          occurredAt: new Date(now),
          data: { state: row.state, seconds: Math.round((now - row.state_since.getTime()) / 1000) },
        });
        return { kind: "wait", until: new Date(now + overdueRepeatMs(attempt + 1)), keepAttempt: true };
      case "none":
        return { kind: "done" };
      default:
        return assertNever(rule.overdue, "overdue rule");
    }
  }

  /** Until when a start may go on (ms since the epoch) whose agent works on it; 0 when none does. */
  function workingUntil(row: DueRow, silenceMs: number): number {
    if (row.phase === null || !workingPhases.includes(row.phase)) return 0;
    const bound = row.state_since.getTime() + options.provisioningMs;
    if (!row.unreachable) return bound;
    return Math.min(bound, (row.disconnected_at?.getTime() ?? 0) + silenceMs);
  }

  return { kind: "allocation", batchSize: 200, handle };
}

function startTimeoutMessage(row: DueRow, tookMs: number): string {
  const minutes = Math.round(tookMs / 60_000);
  const server = row.server_name ?? "the server";
  if (row.unreachable)
    return `${server} is unreachable and did not start the container within ${minutes} minutes`;
  const last = row.message === "" ? "" : `; last heard: ${row.message}`;
  return `${server} did not start the container within ${minutes} minutes${last}`;
}

function overdueMessage(row: DueRow, now: number): string {
  const minutes = Math.round((now - row.state_since.getTime()) / 60_000);
  const why = row.unreachable ? "the server is unreachable" : row.message;
  return `not verified clean on ${row.server_name ?? "its server"} after ${minutes} minutes${why === "" ? "" : `: ${why}`}`;
}
