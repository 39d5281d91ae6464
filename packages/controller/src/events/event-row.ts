import type { ISql, PendingQuery, Row } from "postgres";
import { z } from "zod";

/** An event with its place in the stream. */
export interface EventRow {
  /** 1, 2, 3, ... without gaps: what SSE and WebSocket clients resume on. */
  readonly seq: number;
  readonly id: string;
  readonly type: string;
  readonly severity: "info" | "warning" | "error";
  readonly tenantId: string | null;
  readonly serverId: string | null;
  readonly gpuId: string | null;
  readonly allocationId: string | null;
  readonly actor: string;
  readonly message: string;
  readonly data: Record<string, unknown>;
  readonly occurredAt: Date;
}

/** The event as REST, SSE, WebSocket and NATS show it. */
export const eventJsonSchema = z.object({
  seq: z.int().positive(),
  id: z.uuid(),
  type: z.string(),
  severity: z.enum(["info", "warning", "error"]),
  tenant_id: z.uuid().nullable(),
  server_id: z.uuid().nullable(),
  gpu_id: z.uuid().nullable(),
  allocation_id: z.uuid().nullable(),
  actor: z.string(),
  message: z.string(),
  data: z.record(z.string(), z.unknown()),
  occurred_at: z.iso.datetime(),
});
export type EventJson = z.infer<typeof eventJsonSchema>;

export function eventToJson(event: EventRow): EventJson {
  return {
    seq: event.seq,
    id: event.id,
    type: event.type,
    severity: event.severity,
    tenant_id: event.tenantId,
    server_id: event.serverId,
    gpu_id: event.gpuId,
    allocation_id: event.allocationId,
    actor: event.actor,
    message: event.message,
    data: event.data,
    occurred_at: event.occurredAt.toISOString(),
  };
}

/** Members that are absent match everything; the others must all match. */
export interface EventFilter {
  /** Any of these prefixes: "allocation." matches "allocation.active". Empty: none. */
  readonly typePrefixes?: readonly string[];
  readonly severities?: readonly EventRow["severity"][];
  readonly tenantId?: string;
  readonly serverId?: string;
  readonly gpuId?: string;
  readonly allocationId?: string;
}

/** The filter in memory; `filterSql` is the same rule for the database, and a test compares the two. */
export function matchesFilter(event: EventRow, filter: EventFilter): boolean {
  return (
    (filter.typePrefixes === undefined ||
      filter.typePrefixes.some((prefix) => event.type.startsWith(prefix))) &&
    (filter.severities === undefined || filter.severities.includes(event.severity)) &&
    (filter.tenantId === undefined || event.tenantId === filter.tenantId) &&
    (filter.serverId === undefined || event.serverId === filter.serverId) &&
    (filter.gpuId === undefined || event.gpuId === filter.gpuId) &&
    (filter.allocationId === undefined || event.allocationId === filter.allocationId)
  );
}

export function filterSql(sql: ISql, filter: EventFilter): PendingQuery<Row[]> {
  const { typePrefixes, severities, tenantId, serverId, gpuId, allocationId } = filter;
  return sql`
    true
    ${typePrefixes === undefined ? sql`` : sql`and exists (select from unnest(${[...typePrefixes]}::text[]) as prefix where starts_with(type, prefix))`}
    ${severities === undefined ? sql`` : sql`and severity = any(${[...severities]}::text[])`}
    ${severities === undefined || severities.includes("info") ? sql`` : sql`and severity <> 'info'`}
    ${tenantId === undefined ? sql`` : sql`and tenant_id = ${tenantId}`}
    ${serverId === undefined ? sql`` : sql`and server_id = ${serverId}`}
    ${gpuId === undefined ? sql`` : sql`and gpu_id = ${gpuId}`}
    ${allocationId === undefined ? sql`` : sql`and allocation_id = ${allocationId}`}`;
}

export interface ListEventsOptions {
  /** Exclusive lower bound; absent: from the oldest kept. */
  readonly afterSeq?: number;
  /** Exclusive upper bound, for paging backwards. */
  readonly beforeSeq?: number;
  /** 1 .. 1000 */
  readonly limit: number;
  readonly filter?: EventFilter;
  /** Default "ascending". */
  readonly order?: "ascending" | "descending";
}

/** Columns as postgres returns them: int8 as number, timestamps as Date. */
interface StoredEvent {
  seq: number;
  id: string;
  type: string;
  severity: EventRow["severity"];
  tenant_id: string | null;
  server_id: string | null;
  gpu_id: string | null;
  allocation_id: string | null;
  actor: string;
  message: string;
  data: Record<string, unknown>;
  occurred_at: Date;
}

/**
 * The types that there are, of these prefixes: by the ends of the index's runs, so that the number of types
 * counts and not that of events.
 */
async function typesOf(sql: ISql, prefixes: readonly string[]): Promise<string[]> {
  const rows = await sql<{ type: string }[]>`
    with recursive found(prefix, type) as (
      select prefix, (select type from events where type ~>=~ prefix order by type using ~<~ limit 1)
      from unnest(${[...prefixes]}::text[]) as prefix
      union all
      select prefix, (select type from events where type ~>~ found.type order by type using ~<~ limit 1)
      from found where starts_with(found.type, prefix)
    )
    select distinct type from found where starts_with(type, prefix)`;
  return rows.map((row) => row.type);
}

/** Whether the types are all that narrows the search: then each type's own run of its index is read. */
function typesOnly(filter: EventFilter): readonly string[] | undefined {
  const { typePrefixes, tenantId, serverId, gpuId, allocationId } = filter;
  const others = [tenantId, serverId, gpuId, allocationId];
  return others.every((value) => value === undefined) ? typePrefixes : undefined;
}

/** A page of the stream. Throws what the database throws. */
export async function listEvents(sql: ISql, options: ListEventsOptions): Promise<EventRow[]> {
  const limit = Math.max(1, Math.min(1000, Math.trunc(options.limit)));
  const filter = options.filter ?? {};
  const prefixes = typesOnly(filter);
  const types = prefixes === undefined ? undefined : await typesOf(sql, prefixes);
  const where = sql`
    where ${filterSql(sql, filter)}
    ${options.afterSeq === undefined ? sql`` : sql`and seq > ${options.afterSeq}`}
    ${options.beforeSeq === undefined ? sql`` : sql`and seq < ${options.beforeSeq}`}`;
  const from =
    types === undefined
      ? sql`events ${where}`
      : sql`
          unnest(${types}::text[]) as wanted
          cross join lateral (
            select * from events ${where} and type = wanted order by seq ${options.order === "descending" ? sql`desc` : sql``} limit ${limit}
          ) as one_type`;
  const rows = await sql<StoredEvent[]>`
    select seq, id, type, severity, tenant_id, server_id, gpu_id, allocation_id, actor, message, data, occurred_at
    from ${from}
    order by ${options.order === "descending" ? sql`seq desc` : sql`seq`}
    limit ${limit}`;
  return rows.map((row) => ({
    seq: row.seq,
    id: row.id,
    type: row.type,
    severity: row.severity,
    tenantId: row.tenant_id,
    serverId: row.server_id,
    gpuId: row.gpu_id,
    allocationId: row.allocation_id,
    actor: row.actor,
    message: row.message,
    data: row.data,
    occurredAt: row.occurred_at,
  }));
}
