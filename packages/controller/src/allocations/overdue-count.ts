import type { Sql } from "postgres";
import type { PeriodicJob } from "../reconciler/periodic.ts";
import type { AllocationState } from "@palebluedot/shared/vocabulary.ts";
import type { AllocationMetrics } from "./metrics.ts";
import { allocationStateMachine, statesWithClaims } from "./state-machine.ts";

/** The states that end by themselves within their allowance; an active allocation's lease is another matter. */
const passing = statesWithClaims.filter((state) => allocationStateMachine[state].allowanceMs !== undefined);

/**
 * Sets the gauge of overdue allocations, 0 for a state without any. Reads only what is live, by the index of live
 * allocations.
 */
export async function countOverdue(
  sql: Sql,
  metrics: Pick<AllocationMetrics, "overdue">,
  now: number,
  provisioningMs = 3_600_000,
): Promise<Readonly<Record<string, number>>> {
  const rules = passing.map((state) => ({
    state,
    before: new Date(now - (allocationStateMachine[state].allowanceMs ?? 0)),
  }));
  const rows = await sql<{ state: AllocationState; count: number }[]>`
    select allocation.state, count(*)::int as count
    from jsonb_to_recordset(${JSON.stringify(rules)}::text::jsonb) as rule(state text, before timestamptz)
    join allocations allocation on allocation.state = rule.state and allocation.state_since < rule.before
    where allocation.state in ('scheduled', 'provisioning', 'active', 'releasing')
      and not (allocation.state = 'provisioning' and allocation.observed ->> 'phase' in ('pulling', 'creating')
        and allocation.state_since >= ${new Date(now - provisioningMs)})
    group by allocation.state`;
  const counts = Object.fromEntries(rows.map((row) => [row.state, row.count]));
  for (const state of passing) metrics.overdue.set({ state }, counts[state] ?? 0);
  return counts;
}

/** Counts every 30 seconds on the replica that leads; one that leads no more takes its numbers back. */
export function countOverdueJob(
  sql: Sql,
  metrics: AllocationMetrics,
  now: () => number,
  provisioningMs: number,
): PeriodicJob {
  let term: AbortSignal | undefined;
  return {
    name: "count-overdue",
    cron: "*/30 * * * * *",
    async run(signal) {
      await countOverdue(sql, metrics, now(), provisioningMs);
      if (term === signal) return;
      term = signal;
      signal.addEventListener("abort", () => metrics.overdue.reset(), { once: true });
    },
  };
}
