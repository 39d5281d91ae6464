import { PlatformError } from "@palebluedot/shared/errors.ts";
import type { ISql, Sql } from "postgres";
import { appendEvents } from "../events/outbox.ts";
import type { LabelFilter } from "../http/fields.ts";
import type { GpuRow } from "./view.ts";

export function gpuNotFound(id: string): PlatformError {
  return new PlatformError({
    code: "gpu-not-found",
    kind: "not-found",
    message: `there is no GPU ${id}`,
    hint: "GET /api/v1/gpus lists them; the id is ours, not NVIDIA's UUID.",
  });
}

export interface GpuFilter {
  readonly model?: string | undefined;
  readonly server_id?: string | undefined;
  readonly state?: "free" | "claimed" | undefined;
  readonly health?: GpuRow["health"] | undefined;
  readonly present?: boolean | undefined;
  readonly schedulable?: boolean | undefined;
  readonly labels: LabelFilter;
}

const columns = (sql: ISql) => sql`
  g.id, g.server_id, s.name as server_name, s.session_replica, g.uuid, g.index, g.model, g.serial,
  g.pci_bus_id, g.memory_bytes, g.labels, g.schedulable, g.schedulable_reason, g.present, g.health,
  g.health_reason, g.mig_enabled, g.created_at, g.updated_at,
  (select jsonb_agg(jsonb_build_object('allocation_id', c.allocation_id, 'tenant_id', a.tenant_id,
            'mode', c.mode, 'claimed_at', c.claimed_at, 'usage_ended_at', c.usage_ended_at)
            order by c.claimed_at)
     from claims c join allocations a on a.id = c.allocation_id
    where c.gpu_id = g.id and c.released_at is null) as claims`;

const likePattern = (text: string): string => `%${text.replaceAll(/[\\%_]/g, "\\$&")}%`;

/** By id (oldest first); `limit` rows after `afterId`. */
export async function listGpus(
  sql: Sql,
  filter: GpuFilter,
  afterId: string | undefined,
  limit: number,
): Promise<GpuRow[]> {
  const { labels } = filter;
  const live = sql`exists (select from claims c where c.gpu_id = g.id and c.released_at is null)`;
  return await sql<GpuRow[]>`
    select ${columns(sql)} from gpus g join servers s on s.id = g.server_id
    where true
      ${afterId === undefined ? sql`` : sql`and g.id > ${afterId}`}
      ${filter.model === undefined ? sql`` : sql`and g.model ilike ${likePattern(filter.model)}`}
      ${filter.server_id === undefined ? sql`` : sql`and g.server_id = ${filter.server_id}`}
      ${filter.health === undefined ? sql`` : sql`and g.health = ${filter.health}`}
      ${filter.present === undefined ? sql`` : sql`and g.present = ${filter.present}`}
      ${filter.schedulable === undefined ? sql`` : sql`and g.schedulable = ${filter.schedulable}`}
      ${filter.state === undefined ? sql`` : filter.state === "claimed" ? sql`and ${live}` : sql`and not ${live}`}
      ${Object.keys(labels.equal).length === 0 ? sql`` : sql`and g.labels @> ${sql.json(labels.equal)}`}
      ${labels.present.length === 0 ? sql`` : sql`and g.labels ?& ${[...labels.present]}::text[]`}
    order by g.id limit ${limit}`;
}

/** Throws `gpu-not-found`. */
export async function getGpu(sql: ISql, id: string): Promise<GpuRow & { readonly inventory: unknown }> {
  const rows = await sql<(GpuRow & { inventory: unknown })[]>`
    select ${columns(sql)}, g.inventory from gpus g join servers s on s.id = g.server_id where g.id = ${id}`;
  const row = rows[0];
  if (row === undefined) throw gpuNotFound(id);
  return row;
}

export interface GpuChange {
  readonly labels?: Readonly<Record<string, string>> | undefined;
  readonly scheduling?: { readonly schedulable: boolean; readonly reason: string } | undefined;
}

/** Returns the server whose capacity changed. Throws `gpu-not-found`. */
export async function updateGpu(sql: Sql, id: string, change: GpuChange, actor: string): Promise<string> {
  return await sql.begin(async (tx) => {
    const rows = await tx<{ server_id: string; uuid: string }[]>`
      update gpus set
        ${change.labels === undefined ? tx`` : tx`labels = ${tx.json(change.labels)},`}
        ${change.scheduling === undefined ? tx`` : tx`schedulable = ${change.scheduling.schedulable}, schedulable_reason = ${change.scheduling.reason},`}
        updated_at = now()
      where id = ${id} returning server_id, uuid`;
    const row = rows[0];
    if (row === undefined) throw gpuNotFound(id);
    await appendEvents(tx, [
      {
        type: "gpu.updated",
        serverId: row.server_id,
        gpuId: id,
        actor,
        message: `GPU ${row.uuid} was changed`,
        data: {
          ...(change.labels === undefined ? {} : { labels: change.labels }),
          ...(change.scheduling === undefined
            ? {}
            : { schedulable: change.scheduling.schedulable, reason: change.scheduling.reason }),
        },
      },
    ]);
    return row.server_id;
  });
}

export interface CapacityRow {
  readonly model: string;
  readonly memory_bytes: number | null;
  readonly total_count: number;
  readonly free_count: number;
  readonly claimed_count: number;
  readonly largest_free_count: number;
}

/**
 * GPUs by model, without saying where they are: what a tenant may know. Free means that the scheduler
 * could place a whole-GPU allocation there now.
 */
export async function capacity(sql: Sql): Promise<CapacityRow[]> {
  return await sql<CapacityRow[]>`
    with gpu as (
      select g.model, g.memory_bytes, g.server_id,
        exists (select from claims c where c.gpu_id = g.id and c.released_at is null) as claimed,
        (g.schedulable and g.health <> 'unhealthy' and g.mig_enabled is not true
          and s.state = 'available' and s.pool = 'container' and not s.draining
          and not s.conditions ? 'unreachable'
          and not exists (select from unnest(array['container-engine', 'gpu-driver', 'nvidia-smi']) as part
                          where s.conditions -> part ->> 'status' = 'failed')
          and not exists (select from claims c where c.server_id = s.id and c.released_at is null
                          and c.server_exclusive = 1)) as usable
      from gpus g join servers s on s.id = g.server_id
      where g.present and s.state not in ('pending', 'retired')
    ), per_server as (
      select model, server_id, max(memory_bytes) as memory_bytes, count(*) as total,
        count(*) filter (where claimed) as claimed, count(*) filter (where usable and not claimed) as free
      from gpu group by model, server_id
    )
    select model, max(memory_bytes)::float8 as memory_bytes, sum(total)::int as total_count,
      sum(free)::int as free_count, sum(claimed)::int as claimed_count,
      max(free)::int as largest_free_count
    from per_server group by model order by model`;
}
