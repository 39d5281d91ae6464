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

export interface TransitionWriter {
  /**
   * Writes all in one statement, with everything that belongs to it: state and times, claims, the server's
   * generation, the event, the time at which the reconciler looks next. Transitions whose allocation is in
   * another state by now are left out of the result. A claim conflict (SQLSTATE 23P01) fails the whole
   * statement. At most one transition for each allocation.
   */
  write(sql: ISql, transitions: readonly Transition[], now: number): Promise<Transitioned[]>;
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

  async function write(sql: ISql, transitions: readonly Transition[], now: number): Promise<Transitioned[]> {
    if (transitions.length === 0) return [];
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
      ), held_servers as materialized (
        select id, state = 'available' and pool = 'container' and not draining as takes_more
        from servers where id in (select server_id from input) order by id for no key update
      ), held as materialized (
        select allocation.id, allocation.state, allocation.state_since
        from allocations allocation join input on input.id = allocation.id
        where (select count(*) from held_servers) >= 0
        order by allocation.id for no key update of allocation
      ), changed as (
        update allocations allocation
        set state = input.to_state,
            state_since = ${at},
            end_reason = coalesce(allocation.end_reason, input.end_reason),
            message = coalesce(input.message, allocation.message),
            observed = coalesce(input.observed, allocation.observed),
            server_id = coalesce(allocation.server_id, input.server_id),
            secrets_encrypted = case when input.to_state = 'ended' then null else allocation.secrets_encrypted end,
            scheduled_at = case when input.to_state = 'scheduled' then ${at} else allocation.scheduled_at end,
            active_at = case when input.to_state = 'active' then ${at} else allocation.active_at end,
            expires_at = case when input.to_state = 'active'
              then ${at}::timestamptz + allocation.lease_seconds * interval '1 second' else allocation.expires_at end,
            releasing_at = case when input.to_state = 'releasing' then ${at} else allocation.releasing_at end,
            ended_at = case when input.to_state = 'ended' then ${at} else allocation.ended_at end
        from input join held on held.id = input.id
        where allocation.id = input.id and held.state = any(input.from_states)
          -- Claims are taken all or not at all, and of GPUs that are still there and wanted.
          and (input.to_state <> 'scheduled' or (
            exists (select from held_servers where held_servers.id = input.server_id and takes_more)
            and cardinality(input.gpu_ids) = (
              select count(*) from gpus
              where gpus.id = any(input.gpu_ids) and gpus.server_id = input.server_id
                and present and schedulable and health <> 'unhealthy' and mig_enabled is not true)))
        returning allocation.id, allocation.tenant_id, allocation.server_id, allocation.state, allocation.end_reason,
          allocation.message, allocation.expires_at, held.state as from_state,
          greatest(0, extract(epoch from ${at}::timestamptz - held.state_since))::float8 as seconds
      ), claimed as (
        insert into claims (id, allocation_id, server_id, gpu_id, mode, claimed_at)
        select claim.claim_id, changed.id, changed.server_id, claim.gpu_id, 'whole', ${at}
        from changed join input on input.id = changed.id,
          lateral unnest(input.gpu_ids, input.claim_ids) as claim(gpu_id, claim_id)
        where changed.state = 'scheduled'
        order by claim.gpu_id
      ), freed as (
        update claims
        set usage_ended_at = coalesce(claims.usage_ended_at, ${at}),
            released_at = case when changed.state = 'ended' then ${at}::timestamptz end
        from changed
        where claims.allocation_id = changed.id and claims.released_at is null
          and changed.state in ('releasing', 'ended')
      ), generations as (
        update servers set desired_generation = desired_generation + 1, updated_at = ${at}
        where id in (select server_id from changed where state in ('scheduled', 'releasing', 'ended'))
      ), told as (
        insert into outbox (id, type, severity, tenant_id, server_id, allocation_id, actor, message, data, occurred_at)
        select input.event_id, 'allocation.' || changed.state, input.severity, changed.tenant_id, changed.server_id,
          changed.id, input.actor, changed.message,
          jsonb_strip_nulls(jsonb_build_object('from', changed.from_state, 'to', changed.state,
            'end_reason', changed.end_reason, 'expires_at', changed.expires_at,
            'gpu_ids', case when changed.state = 'scheduled' then to_jsonb(input.gpu_ids) end)),
          ${at}
        from changed join input on input.id = changed.id
      ), due as (
        insert into reconcile_queue as queue (kind, key, due_at)
        select 'allocation', changed.id, coalesce(
          case when changed.state = 'active' then changed.expires_at end,
          ${at}::timestamptz + input.allowance_ms * interval '1 millisecond')
        from changed join input on input.id = changed.id
        where changed.state <> 'ended' order by changed.id
        -- A worker that holds the row is fenced: what it saw is over.
        on conflict (kind, key) do update
          set due_at = excluded.due_at, attempt = 0, lease_token = queue.lease_token + 1, leased_until = null,
            last_error = null
      ), finished as (
        delete from reconcile_queue where kind = 'allocation' and key in (select id from changed where state = 'ended')
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
