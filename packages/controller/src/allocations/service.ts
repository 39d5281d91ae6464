import { leaseSecondsMax, type Allocation } from "@palebluedot/shared/allocation-request.ts";
import type { Clock } from "@palebluedot/shared/clock.ts";
import { PlatformError } from "@palebluedot/shared/errors.ts";
import type { Logger } from "@palebluedot/shared/logger.ts";
import type { SecretBox } from "@palebluedot/shared/secret-box.ts";
import type { AllocationState } from "@palebluedot/shared/vocabulary.ts";
import type { Sql } from "postgres";
import { uuidv7 } from "uuidv7";
import type { Failpoints } from "../reconciler/failpoints.ts";
import type { Submission } from "../scheduler/scheduler.ts";
import { createBatcher } from "./batching.ts";
import {
  insertAllocations,
  prepareAllocation,
  presentNew,
  type CreationResult,
  type NewAllocation,
} from "./creation.ts";
import { allocationColumns, presentAllocation, type AllocationRow } from "./rows.ts";
import { statesBefore } from "./state-machine.ts";
import { retryDeadlocks, type Transition, type Transitioned, type TransitionWriter } from "./transitions.ts";
import type { AllocationCaller, AllocationService } from "./types.ts";

export interface AllocationServiceOptions {
  readonly sql: Sql;
  readonly clock: Clock;
  readonly log: Logger;
  readonly secrets: SecretBox;
  readonly failpoints: Failpoints;
  readonly writer: TransitionWriter;
  /** Committed: to be placed. */
  readonly onCreated: (submissions: readonly Submission[]) => void;
  /** Committed changes of state. */
  readonly onTransitioned: (done: readonly Transitioned[]) => void;
}

function notFound(id: string): PlatformError {
  return new PlatformError({
    code: "allocation-not-found",
    kind: "not-found",
    message: `there is no allocation ${id}`,
    hint: "GET /api/v1/allocations lists yours.",
  });
}

function creationError(result: CreationResult, allocation: NewAllocation): PlatformError | undefined {
  if (result.kind === "tenant-unknown") {
    return new PlatformError({
      code: "tenant-not-found",
      kind: "invalid",
      status: 422,
      message: `there is no tenant ${allocation.tenantId}, or it is disabled`,
      hint: "GET /api/v1/tenants lists them.",
    });
  }
  if (result.kind === "key-reused") {
    return new PlatformError({
      code: "idempotency-key-reused",
      kind: "invalid",
      status: 422,
      message: "this Idempotency-Key was used for another request within the last 24 hours",
      hint: "Send a new key with a new request, and the old key only with the very same one.",
    });
  }
  return undefined;
}

/** What a release means in each state; undefined: nothing to do. */
function releaseOf(row: AllocationRow, caller: AllocationCaller): Transition | undefined {
  const common = { id: row.id, actor: caller.actor };
  if (row.state === "queued") {
    return {
      ...common,
      from: ["queued"],
      to: "ended",
      serverId: null,
      endReason: "cancelled",
      message: "cancelled before it started",
    };
  }
  const live: readonly AllocationState[] = statesBefore("releasing");
  if (!live.includes(row.state)) return undefined;
  return {
    ...common,
    from: live,
    to: "releasing",
    serverId: row.server_id,
    endReason: "released",
    message: "released",
  };
}

export function createAllocationService(options: AllocationServiceOptions): AllocationService {
  const { sql, clock, log, writer } = options;

  const creations = createBatcher<NewAllocation, CreationResult>({
    maxBatch: 128,
    // The second gathers while the first waits for the disk.
    concurrency: 2,
    run: (batch) => retryDeadlocks(() => insertAllocations(sql, batch), log),
  });

  const releases = createBatcher<Transition, Transitioned | undefined>({
    maxBatch: 128,
    concurrency: 2,
    run: async (batch) => {
      // Of two that release the same one, the first does it and the other looks again.
      const byId = new Map(batch.toReversed().map((transition) => [transition.id, transition]));
      const done = await retryDeadlocks(() => writer.write(sql, [...byId.values()], clock.now()), log);
      writer.committed(done);
      options.onTransitioned(done);
      const doneById = new Map(done.map((change) => [change.id, change]));
      return batch.map((transition) =>
        byId.get(transition.id) === transition ? doneById.get(transition.id) : undefined,
      );
    },
  });

  async function find(caller: AllocationCaller, id: string): Promise<AllocationRow> {
    const rows = await sql<AllocationRow[]>`
      select ${allocationColumns(sql)}
      from allocations allocation left join servers server on server.id = allocation.server_id
      where allocation.id = ${id}
        ${caller.tenantId === undefined ? sql`` : sql`and allocation.tenant_id = ${caller.tenantId}`}`;
    const row = rows[0];
    if (row === undefined) throw notFound(id);
    return row;
  }

  return {
    async create(caller, request, createOptions = {}) {
      const prepared = prepareAllocation(caller, request, createOptions.idempotencyKey, {
        now: clock.now(),
        secrets: options.secrets,
      });
      const result = await creations.submit(prepared);
      if (result.kind === "repeated") {
        const row = await find({ ...caller, tenantId: prepared.tenantId }, result.allocationId);
        return { allocation: presentAllocation(row), created: false };
      }
      const error = creationError(result, prepared);
      if (error !== undefined) throw error;
      options.failpoints.hit("allocation-accepted");
      const allocation = presentNew(prepared);
      options.onCreated([
        {
          id: prepared.id,
          priority: prepared.priority,
          createdAt: prepared.createdAt,
          gpus: prepared.request.gpus,
          message: allocation.message,
        },
      ]);
      return { allocation, created: true };
    },

    async list(caller, query): Promise<Allocation[]> {
      const tenantId = caller.tenantId ?? query.tenantId;
      const rows = await sql<AllocationRow[]>`
        select ${allocationColumns(sql)}
        from allocations allocation left join servers server on server.id = allocation.server_id
        where true
          ${tenantId === undefined ? sql`` : sql`and allocation.tenant_id = ${tenantId}`}
          ${query.afterId === undefined ? sql`` : sql`and allocation.id < ${query.afterId}`}
          ${query.states === undefined ? sql`` : sql`and allocation.state = any(${query.states as string[]})`}
          ${query.serverId === undefined ? sql`` : sql`and allocation.server_id = ${query.serverId}`}
          ${query.name === undefined ? sql`` : sql`and allocation.name = ${query.name}`}
        order by allocation.id desc limit ${query.limit}`;
      return rows.map(presentAllocation);
    },

    async get(caller, id) {
      return presentAllocation(await find(caller, id));
    },

    async outputTail(caller, id) {
      const [row] = await sql<{ output_tail: string | null }[]>`
        select encode(output_tail, 'base64') as output_tail from allocations where id = ${id}
          ${caller.tenantId === undefined ? sql`` : sql`and tenant_id = ${caller.tenantId}`}`;
      if (row === undefined) throw notFound(id);
      return row.output_tail === null ? undefined : Buffer.from(row.output_tail, "base64");
    },

    async release(caller, id) {
      // It may change state between reading and writing: then it is read again.
      for (let attempt = 0; attempt < 8; attempt += 1) {
        const row = await find(caller, id);
        const transition = releaseOf(row, caller);
        if (transition === undefined) return presentAllocation(row);
        if ((await releases.submit(transition)) === undefined) continue;
        return presentAllocation(await find(caller, id));
      }
      throw new PlatformError({
        code: "allocation-busy",
        kind: "conflict",
        retryable: true,
        message: `allocation ${id} changes its state faster than it can be released`,
        hint: "Try again.",
      });
    },

    async abandonOn(tx, serverId, why) {
      const rows = await tx<{ id: string; state: AllocationState }[]>`
        select id, state from allocations
        where server_id = ${serverId} and state in ('scheduled', 'provisioning', 'active', 'releasing') order by id`;
      const common = {
        serverId,
        actor: why.actor,
        severity: "error" as const,
        message: `its server was retired without a clean-up: ${why.reason}`,
      };
      const live = statesBefore("releasing");
      const now = clock.now();
      // Through releasing, as every path that held a claim.
      const released = await writer.write(
        tx,
        rows
          .filter((row) => live.includes(row.state))
          .map(({ id }) => ({ ...common, id, from: live, to: "releasing", endReason: "failed" })),
        now,
      );
      const ended = await writer.write(
        tx,
        rows.map(({ id }) => ({ ...common, id, from: ["releasing"], to: "ended" })),
        now,
      );
      return () => {
        const done = [...released, ...ended];
        writer.committed(done);
        options.onTransitioned(done);
      };
    },

    async extend(caller, id, extendSeconds) {
      const before = await find(caller, id);
      if (before.lease_seconds + extendSeconds > leaseSecondsMax) {
        throw new PlatformError({
          code: "lease-too-long",
          kind: "invalid",
          status: 422,
          message: `the lease would be ${before.lease_seconds + extendSeconds} seconds, at most ${leaseSecondsMax} are possible`,
          hint: `Extend by at most ${leaseSecondsMax - before.lease_seconds} seconds.`,
        });
      }
      // The reconciler looks at the new end only: the queue row moves in the same statement.
      const rows = await sql`
        with extended as (
          update allocations
          set lease_seconds = lease_seconds + ${extendSeconds},
            expires_at = expires_at + ${extendSeconds} * interval '1 second'
          where id = ${id} and state in ('queued', 'scheduled', 'provisioning', 'active')
            and lease_seconds + ${extendSeconds} <= ${leaseSecondsMax}
            ${caller.tenantId === undefined ? sql`` : sql`and tenant_id = ${caller.tenantId}`}
          returning id, tenant_id, server_id, state, expires_at, lease_seconds
        ), due as (
          update reconcile_queue queue
          set due_at = extended.expires_at, lease_token = queue.lease_token + 1, leased_until = null
          from extended where queue.kind = 'allocation' and queue.key = extended.id and extended.state = 'active'
        ), told as (
          insert into outbox (id, type, tenant_id, server_id, allocation_id, actor, message, data)
          select ${uuidv7()}, 'allocation.extended', tenant_id, server_id, id, ${caller.actor},
            ${`the lease is ${extendSeconds} seconds longer`},
            jsonb_strip_nulls(jsonb_build_object('lease_seconds', lease_seconds, 'expires_at', expires_at))
          from extended
        )
        select id from extended`;
      const after = await find(caller, id);
      if (rows.length > 0) return presentAllocation(after);
      throw new PlatformError({
        code: "allocation-not-live",
        kind: "conflict",
        message: `allocation ${id} is ${after.state}; its lease cannot be extended`,
        hint: "Ask for a new allocation.",
      });
    },
  };
}
