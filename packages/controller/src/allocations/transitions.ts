import type { ObservedWorkload } from "@palebluedot/shared/allocation-request.ts";
import { errorMessage } from "@palebluedot/shared/errors.ts";
import type { Logger } from "@palebluedot/shared/logger.ts";
import type { AllocationState, EndReason } from "@palebluedot/shared/vocabulary.ts";
import type { ISql } from "postgres";
import { uuidv7 } from "uuidv7";
import { databaseErrorCode } from "../db/connect.ts";
import { storableText } from "../events/outbox.ts";
import type { AllocationMetrics } from "./metrics.ts";
import { allocationStateMachine } from "./state-machine.ts";

/** A wanted change of one allocation's state. It happens only if the allocation is in one of `from`. */
export interface Transition {
  readonly id: string;
  readonly from: readonly AllocationState[];
  readonly to: AllocationState;
  /** Needed for `releasing` and for `ended` from `queued`. A reason that is there already stays. */
  readonly endReason?: EndReason;
  /** For people. Undefined keeps what is there. */
  readonly message?: string;
  readonly observed?: ObservedWorkload;
  /** Where the allocation is, or goes to. Null for one that never left the queue. */
  readonly serverId: string | null;
  /** `scheduled` only: the GPUs that it claims. All or nothing. */
  readonly gpuIds?: readonly string[];
  readonly actor?: string;
  readonly severity?: "info" | "warning" | "error";
}

/** A change that happened. */
export interface Transitioned {
  readonly id: string;
  readonly tenantId: string;
  readonly serverId: string | null;
  readonly from: AllocationState;
  readonly to: AllocationState;
  readonly endReason: EndReason | null;
}

export interface ReachedGeneration {
  readonly id: string;
  readonly generation: number;
}

export interface TransitionWriter {
  /**
   * Writes all in one statement, with everything that belongs to it: state and times, claims, the server's
   * generation, the event, the time at which the reconciler looks next. Transitions whose allocation is in
   * another state by now are left out of the result. A claim conflict (SQLSTATE 23P01) fails the whole
   * statement. At most one transition for each allocation. `reached`: the generations that agents reported to
   * have reached, at most one for each server; they never fall.
   */
  write(
    sql: ISql,
    transitions: readonly Transition[],
    now: number,
    reached?: readonly ReachedGeneration[],
  ): Promise<Transitioned[]>;
  /** Counts and logs; call it when the transaction is committed. */
  committed(done: readonly Transitioned[]): void;
}

interface ChangedRow {
  id: string;
  tenant_id: string;
  server_id: string | null;
  from_state: AllocationState;
  state: AllocationState;
  end_reason: EndReason | null;
  seconds: number;
}

/**
 * The one place where an allocation's state is written. Locks in a fixed order (servers, allocations, queue
 * rows, each by id), so that batches of several writers do not deadlock.
 */
export function createTransitionWriter(options: {
  readonly log: Logger;
  readonly metrics: AllocationMetrics;
}): TransitionWriter {
  const { log, metrics } = options;
  const seconds = new WeakMap<Transitioned, number>();

  async function write(
    sql: ISql,
    transitions: readonly Transition[],
    now: number,
    reached: readonly ReachedGeneration[] = [],
  ): Promise<Transitioned[]> {
    if (transitions.length === 0 && reached.length === 0) return [];
    for (const transition of transitions) check(transition);
    const input = JSON.stringify(
      transitions.map((transition) => ({
        id: transition.id,
        from_states: transition.from,
        to_state: transition.to,
        end_reason: transition.endReason ?? null,
        message: transition.message === undefined ? null : storableText(transition.message.slice(0, 4096)),
        observed: transition.observed ?? null,
        server_id: transition.serverId,
        gpu_ids: transition.gpuIds ?? [],
        claim_ids: (transition.gpuIds ?? []).map(() => uuidv7()),
        event_id: uuidv7(),
        actor: transition.actor ?? "system",
        severity: transition.severity ?? "info",
        allowance_ms: allocationStateMachine[transition.to].allowanceMs ?? null,
      })),
    );
    const at = new Date(now);
    const rows = await sql<ChangedRow[]>`
      with input as materialized (
        select * from jsonb_to_recordset(${input}::text::jsonb) as input(
          id uuid, from_states text[], to_state text, end_reason text, message text, observed jsonb, server_id uuid,
          gpu_ids uuid[], claim_ids uuid[], event_id uuid, actor text, severity text, allowance_ms bigint)
      ), reached as materialized (
        select * from jsonb_to_recordset(${JSON.stringify(reached)}::text::jsonb) as reached(id uuid, generation bigint)
      ), held_servers as materialized (
        select id, state = 'available' and pool = 'container' and not draining as takes_more
        from servers where id = any(array(select server_id from input union select id from reached))
        order by id for no key update
      ), held as materialized (
        -- All that the steps below need, so that none of them joins with the input again.
        select allocation.state as from_state, allocation.state_since as from_since, input.*
        from allocations allocation join input on input.id = allocation.id
        where (select count(*) from held_servers) >= 0
        order by allocation.id for no key update of allocation
      ), changed as (
        update allocations allocation
        set state = held.to_state,
            state_since = ${at},
            end_reason = coalesce(allocation.end_reason, held.end_reason),
            message = coalesce(held.message, allocation.message),
            observed = coalesce(held.observed, allocation.observed),
            server_id = coalesce(allocation.server_id, held.server_id),
            secrets_encrypted = case when held.to_state = 'ended' then null else allocation.secrets_encrypted end,
            scheduled_at = case when held.to_state = 'scheduled' then ${at} else allocation.scheduled_at end,
            active_at = case when held.to_state = 'active' then ${at} else allocation.active_at end,
            expires_at = case when held.to_state = 'active'
              then ${at}::timestamptz + allocation.lease_seconds * interval '1 second' else allocation.expires_at end,
            releasing_at = case when held.to_state = 'releasing' then ${at} else allocation.releasing_at end,
            ended_at = case when held.to_state = 'ended' then ${at} else allocation.ended_at end
        from held
        where allocation.id = held.id and held.from_state = any(held.from_states)
          -- Claims are taken all or not at all, and of GPUs that are still there and wanted.
          and (held.to_state <> 'scheduled' or (
            held.server_id in (select id from held_servers where takes_more)
            and cardinality(held.gpu_ids) = (
              select count(*) from gpus
              where gpus.id = any(held.gpu_ids) and gpus.server_id = held.server_id
                and present and schedulable and health <> 'unhealthy' and mig_enabled is not true)))
        returning allocation.id, allocation.tenant_id, allocation.server_id, allocation.state, allocation.end_reason,
          allocation.message, allocation.expires_at, held.from_state, held.gpu_ids, held.claim_ids, held.event_id,
          held.actor, held.severity, held.allowance_ms,
          greatest(0, extract(epoch from ${at}::timestamptz - held.from_since))::float8 as seconds
      ), claimed as (
        insert into claims (id, allocation_id, server_id, gpu_id, mode, claimed_at)
        select claim.claim_id, changed.id, changed.server_id, claim.gpu_id, 'whole', ${at}
        from changed, lateral unnest(changed.gpu_ids, changed.claim_ids) as claim(gpu_id, claim_id)
        where changed.state = 'scheduled'
        order by claim.gpu_id
      ), freed as (
        update claims
        set usage_ended_at = coalesce(usage_ended_at, ${at}),
            released_at = case when allocation_id = any(array(select id from changed where state = 'ended'))
              then ${at}::timestamptz end
        where released_at is null
          and allocation_id = any(array(select id from changed where state in ('releasing', 'ended')))
      ), generations as (
        update servers
        set desired_generation = desired_generation + case when id = any(array(
              select server_id from changed where state in ('scheduled', 'releasing', 'ended'))) then 1 else 0 end,
            observed_generation = greatest(observed_generation,
              (select generation from reached where reached.id = servers.id)),
            updated_at = ${at}
        where id = any(array(
          select server_id from changed where state in ('scheduled', 'releasing', 'ended')
          union select id from reached))
      ), told as (
        insert into outbox (id, type, severity, tenant_id, server_id, allocation_id, actor, message, data, occurred_at)
        select event_id, 'allocation.' || state, severity, tenant_id, server_id, id, actor,
          -- On the allocation a message says what is amiss; an event also says that all is well.
          case when message <> '' then message when state = 'scheduled' then 'placed on a server'
            when state = 'active' then 'the container runs' else 'it is ' || state end,
          jsonb_strip_nulls(jsonb_build_object('from', from_state, 'to', state,
            'end_reason', end_reason, 'expires_at', expires_at,
            'gpu_ids', case when state = 'scheduled' then to_jsonb(gpu_ids) end)),
          ${at}
        from changed
      ), due as (
        insert into reconcile_queue as queue (kind, key, due_at)
        select 'allocation', id, coalesce(
          case when state = 'active' then expires_at end,
          ${at}::timestamptz + allowance_ms * interval '1 millisecond')
        from changed
        where state <> 'ended' order by id
        -- A worker that holds the row is fenced: what it saw is over.
        on conflict (kind, key) do update
          set due_at = excluded.due_at, attempt = 0, lease_token = queue.lease_token + 1, leased_until = null,
            last_error = null
      ), finished as (
        delete from reconcile_queue
        where kind = 'allocation' and key = any(array(select id from changed where state = 'ended'))
      )
      select id, tenant_id, server_id, from_state, state, end_reason, seconds from changed`;
    return rows.map((row) => {
      const done: Transitioned = {
        id: row.id,
        tenantId: row.tenant_id,
        serverId: row.server_id,
        from: row.from_state,
        to: row.state,
        endReason: row.end_reason,
      };
      seconds.set(done, row.seconds);
      return done;
    });
  }

  return {
    write,
    committed(done) {
      for (const { id, serverId, from, to, endReason, ...rest } of done) {
        metrics.transitions.inc({ from, to, end_reason: endReason ?? "" });
        log.info(
          {
            allocation_id: id,
            tenant_id: rest.tenantId,
            server_id: serverId,
            from,
            to,
            end_reason: endReason,
          },
          "allocation changed state",
        );
      }
      for (const change of done) {
        const duration = seconds.get(change);
        if (duration !== undefined) metrics.stateSeconds.observe({ state: change.from }, duration);
      }
    },
  };
}

function check(transition: Transition): void {
  for (const from of transition.from) {
    if (!allocationStateMachine[from].to.includes(transition.to)) {
      throw new Error(`an allocation does not go from ${from} to ${transition.to}`);
    }
  }
  if (
    transition.to === "scheduled" &&
    (transition.serverId === null || (transition.gpuIds ?? []).length === 0)
  ) {
    throw new Error("an allocation is scheduled to GPUs of a server");
  }
}

const retryableCodes = new Set(["40P01", "40001"]);

/** Runs again what lost a deadlock; anything else is the caller's. */
export async function retryDeadlocks<T>(run: () => Promise<T>, log: Logger): Promise<T> {
  for (let attempt = 0; ; attempt += 1) {
    try {
      return await run();
    } catch (error) {
      if (attempt >= 5 || !retryableCodes.has(databaseErrorCode(error) ?? "")) throw error;
      log.debug({ attempt, error: errorMessage(error) }, "deadlock, trying again");
    }
  }
}
