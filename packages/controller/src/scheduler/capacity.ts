import type { Sql } from "postgres";
import type { GpuCapacity, ServerCapacity } from "./placement.ts";

interface ServerRow {
  id: string;
  labels: Record<string, string>;
  state: string;
  pool: string;
  draining: boolean;
  conditions: Record<string, { status?: string; reason?: string } | null>;
  exclusive: boolean;
}

interface GpuRow {
  id: string;
  server_id: string;
  index: number;
  model: string;
  memory_bytes: number | null;
  labels: Record<string, string>;
  usable: boolean;
  claimed: boolean;
}

/** Conditions that close a server to new work; the agent's own only when they failed. */
const closingConditions = ["unreachable", "draining", "unhealthy"] as const;
const closingComponents = ["container-engine", "gpu-driver", "nvidia-smi"] as const;

/** Why nothing new may land on a server, in words that fit behind a count; undefined when it may. */
export function closedBecause(server: Omit<ServerRow, "id" | "labels">): string | undefined {
  if (server.pool !== "container") return "bare metal";
  if (server.state !== "available") return `in state ${server.state}`;
  if (server.draining) return "draining";
  if (server.exclusive) return "used as a whole";
  for (const name of closingConditions) {
    const condition = server.conditions[name];
    if (condition !== undefined && condition !== null && condition.status !== "ok") return name;
  }
  for (const name of closingComponents) {
    if (server.conditions[name]?.status === "failed") return `with a failed ${name}`;
  }
  return undefined;
}

/** What these servers can give now. Ids that are no servers are left out. */
export async function readCapacity(sql: Sql, serverIds: readonly string[]): Promise<ServerCapacity[]> {
  if (serverIds.length === 0) return [];
  const ids = serverIds as string[];
  const [servers, gpus] = await Promise.all([
    sql<ServerRow[]>`
      select id, labels, state, pool, draining, conditions,
        exists (
          select from claims where claims.server_id = servers.id and released_at is null and server_exclusive = 1
        ) as exclusive
      from servers where id = any(${ids}::uuid[])`,
    sql<GpuRow[]>`
      select gpus.id, gpus.server_id, index, model, memory_bytes, labels,
        schedulable and health <> 'unhealthy' and mig_enabled is not true as usable,
        exists (select from claims where claims.gpu_id = gpus.id and released_at is null) as claimed
      from gpus where gpus.server_id = any(${ids}::uuid[]) and present
      order by gpus.server_id, index`,
  ]);
  const gpusOf = new Map<string, GpuCapacity[]>();
  for (const row of gpus) {
    let list = gpusOf.get(row.server_id);
    if (list === undefined) gpusOf.set(row.server_id, (list = []));
    list.push({
      id: row.id,
      index: row.index,
      model: row.model,
      memoryBytes: row.memory_bytes,
      labels: row.labels,
      usable: row.usable,
      claimed: row.claimed,
    });
  }
  return servers.map((row) => ({
    id: row.id,
    labels: row.labels,
    closedBecause: closedBecause(row),
    gpus: gpusOf.get(row.id) ?? [],
  }));
}
