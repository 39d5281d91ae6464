import type { Allocation } from "@palebluedot/shared/allocation-request.ts";
import type { Sql } from "postgres";

type TimeName = "expires_at" | "scheduled_at" | "active_at" | "releasing_at" | "ended_at";

/** An allocation with what the API shows beside it, as the database client returns it. */
export type AllocationRow = Omit<Allocation, TimeName | "state_since" | "created_at"> & {
  readonly state_since: Date;
  readonly created_at: Date;
} & Readonly<Record<TimeName, Date | null>>;

/** Columns for `from allocations allocation left join servers server on server.id = allocation.server_id`. */
export function allocationColumns(sql: Sql) {
  return sql`
    allocation.id, allocation.tenant_id, allocation.name, allocation.state, allocation.state_since,
    allocation.end_reason, allocation.message, allocation.request, allocation.priority, allocation.lease_seconds,
    allocation.expires_at, allocation.server_id, server.name as server_name, allocation.observed,
    allocation.created_at, allocation.scheduled_at, allocation.active_at, allocation.releasing_at,
    allocation.ended_at,
    coalesce((
      select jsonb_agg(jsonb_build_object('id', gpu.id, 'uuid', gpu.uuid, 'index', gpu.index, 'model', gpu.model)
        order by gpu.index)
      from claims claim join gpus gpu on gpu.id = claim.gpu_id where claim.allocation_id = allocation.id
    ), '[]') as gpus`;
}

const time = (date: Date | null): string | null => date?.toISOString() ?? null;

export function presentAllocation(row: AllocationRow): Allocation {
  return {
    ...row,
    state_since: row.state_since.toISOString(),
    created_at: row.created_at.toISOString(),
    expires_at: time(row.expires_at),
    scheduled_at: time(row.scheduled_at),
    active_at: time(row.active_at),
    releasing_at: time(row.releasing_at),
    ended_at: time(row.ended_at),
  };
}
