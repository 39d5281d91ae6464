import { PlatformError } from "@palebluedot/shared/errors.ts";
import type { Logger } from "@palebluedot/shared/logger.ts";
import type { GpuInventory } from "@palebluedot/shared/generated/palebluedot/agent/v1/agent.ts";
import type { Sql, TransactionSql } from "postgres";
import { uuidv7 } from "uuidv7";
import { appendEvents } from "../events/outbox.ts";
import type { NewEvent } from "../events/types.ts";
import { reservedConditions, type CleanInventory, type StoredCondition } from "./clean-inventory.ts";
import type { ServerStates } from "./state-machine.ts";

export interface IngestResult {
  /** The GPUs that are this server's by the database: only these may it speak for. */
  readonly gpuUuids: readonly string[];
  /** No longer reported since now. */
  readonly goneUuids: readonly string[];
}

/** Rows of one server, those of GPUs that it no longer has included: an agent that makes up GPUs fills no disk. */
export const maxGpuRowsPerServer = 256;

type Health = "healthy" | "degraded" | "unhealthy" | "unknown";

interface GpuRow {
  id: string;
  uuid: string;
  server_id: string;
  health: Health;
  present: boolean;
  owner_connected: boolean;
  claimed: boolean;
}

/**
 * Writes what an agent reports of its server, in one transaction: the host's inventory and conditions, its
 * GPUs, and events for what changed. A session with an older epoch writes nothing (undefined).
 * Throws PlatformError `too-many-gpus`.
 */
export async function ingestInventory(
  deps: { readonly sql: Sql; readonly log: Logger; readonly states: ServerStates },
  session: { readonly serverId: string; readonly epoch: number },
  inventory: CleanInventory,
): Promise<IngestResult | undefined> {
  const { serverId } = session;
  return await deps.sql.begin(async (tx) => {
    const [server] = await tx<
      { name: string; state: string; conditions: Record<string, StoredCondition> }[]
    >`select name, state, conditions from servers where id = ${serverId} and session_epoch = ${session.epoch} for update`;
    if (server === undefined) return undefined;

    const events: NewEvent[] = [];
    const { accepted, refused } = await sortOut(tx, serverId, inventory.gpus);
    const conditions: Record<string, StoredCondition> = { ...inventory.conditions };
    for (const name of reservedConditions) {
      const kept = server.conditions[name];
      if (kept !== undefined && name !== "gpu-identity") conditions[name] = kept;
    }
    if (refused.length > 0) {
      const before = server.conditions["gpu-identity"];
      const message = `reports GPUs that belong to another server: ${refused.map((gpu) => gpu.uuid).join(", ")}`;
      conditions["gpu-identity"] =
        before?.message === message
          ? before
          : { status: "failed", reason: "gpu-identity-conflict", message, since: new Date().toISOString() };
      if (before?.message !== message) {
        events.push({
          type: "gpu.identity-conflict",
          severity: "error",
          serverId,
          actor: `agent:${serverId}`,
          message: `${server.name} ${message}`,
          data: { gpu_uuids: refused.map((gpu) => gpu.uuid) },
        });
      }
    }
    events.push(...conditionEvents(serverId, server.conditions, conditions));
    await tx`
      update servers set inventory = ${tx.json(asJson({ sha256: inventory.sha256, host: inventory.host }))},
        conditions = ${tx.json(asJson(conditions))}, updated_at = now()
      where id = ${serverId}`;
    await makeRoom(tx, serverId, accepted);
    const written = await writeGpus(tx, serverId, accepted, conditions);
    events.push(...written.events);
    await appendEvents(tx, events);
    await deps.states.transition(tx, {
      serverId,
      from: ["verifying"],
      to: "available",
      message: "",
      actor: "system",
    });
    return { gpuUuids: accepted.map(({ gpu }) => gpu.uuid), goneUuids: written.goneUuids };
  });
}

/**
 * Forgets the GPUs that were gone longest, where more are new than fit. What a tenant ever had is history, and
 * what an operator closed or labelled is an operator's word: these stay.
 */
async function makeRoom(tx: TransactionSql, serverId: string, accepted: readonly Accepted[]): Promise<void> {
  const arriving = accepted.filter(({ row }) => row?.server_id !== serverId).length;
  if (arriving === 0) return;
  const [count] = await tx<{ rows: number }[]>`
    select count(*)::int as rows from gpus where server_id = ${serverId}`;
  const surplus = (count?.rows ?? 0) + arriving - maxGpuRowsPerServer;
  if (surplus <= 0) return;
  const forgotten = await tx`
    delete from gpus where id in (
      select id from gpus g
      where server_id = ${serverId} and not present and schedulable and labels = '{}'
        and not exists (select 1 from claims c where c.gpu_id = g.id)
        and not (uuid = any(${accepted.map(({ gpu }) => gpu.uuid)}))
      order by updated_at, id limit ${surplus})`;
  if (forgotten.count >= surplus) return;
  throw new PlatformError({
    code: "too-many-gpus",
    kind: "invalid",
    message: `the server has had ${maxGpuRowsPerServer} GPUs by now`,
    hint: "If all of them were real: retire the server and enrol the host again.",
  });
}

interface Accepted {
  readonly gpu: GpuInventory;
  readonly row: GpuRow | undefined;
}

/** A GPU of another server is taken over only when that server is away and nobody holds a claim on the GPU. */
async function sortOut(
  tx: TransactionSql,
  serverId: string,
  gpus: readonly GpuInventory[],
): Promise<{ accepted: readonly Accepted[]; refused: readonly GpuInventory[] }> {
  const rows = await tx<GpuRow[]>`
    select g.id, g.uuid, g.server_id, g.health, g.present,
      (o.session_replica is not null) as owner_connected,
      exists (select 1 from claims c where c.gpu_id = g.id and c.released_at is null) as claimed
    from gpus g join servers o on o.id = g.server_id
    where g.uuid = any(${gpus.map((gpu) => gpu.uuid)}) order by g.id for update of g`;
  const known = new Map(rows.map((row) => [row.uuid, row]));
  const accepted: Accepted[] = [];
  const refused: GpuInventory[] = [];
  for (const gpu of gpus) {
    const row = known.get(gpu.uuid);
    const foreign = row !== undefined && row.server_id !== serverId;
    if (foreign && (row.owner_connected || row.claimed)) refused.push(gpu);
    else accepted.push({ gpu, row });
  }
  return { accepted, refused };
}

async function writeGpus(
  tx: TransactionSql,
  serverId: string,
  accepted: readonly Accepted[],
  conditions: Readonly<Record<string, StoredCondition>>,
): Promise<{ readonly events: readonly NewEvent[]; readonly goneUuids: readonly string[] }> {
  const events: NewEvent[] = [];
  const rows = accepted.map(({ gpu, row }) => {
    const { health, reason } = gpuHealth(gpu, conditions);
    const id = row?.id ?? uuidv7();
    const about = { serverId, gpuId: id, actor: `agent:${serverId}` };
    if (row === undefined) {
      events.push({
        ...about,
        type: "gpu.found",
        message: `${gpu.model} ${gpu.uuid}`,
        data: { uuid: gpu.uuid },
      });
    } else {
      if (row.server_id !== serverId) {
        events.push({
          ...about,
          type: "gpu.moved",
          severity: "warning",
          message: `${gpu.uuid} was found in another server`,
          data: { uuid: gpu.uuid, from_server_id: row.server_id },
        });
      }
      if (row.health !== health) {
        events.push({
          ...about,
          type: "gpu.health-changed",
          severity: health === "unhealthy" ? "error" : health === "degraded" ? "warning" : "info",
          message: `${gpu.uuid} is ${health}${reason === "" ? "" : `: ${reason}`}`,
          data: { uuid: gpu.uuid, from: row.health, to: health, reason },
        });
      }
    }
    return {
      id,
      uuid: gpu.uuid,
      index: gpu.index,
      model: gpu.model,
      serial: gpu.serial ?? null,
      pci_bus_id: gpu.pciBusId,
      memory_bytes: gpu.memoryTotalBytes ?? null,
      inventory: gpu,
      health,
      health_reason: reason,
      mig_enabled: gpu.migEnabled ?? null,
    };
  });
  await tx`
    insert into gpus (id, server_id, uuid, index, model, serial, pci_bus_id, memory_bytes, inventory, health, health_reason, mig_enabled)
    select id, ${serverId}, uuid, index, model, serial, pci_bus_id, memory_bytes, inventory, health, health_reason, mig_enabled
    from jsonb_to_recordset(${JSON.stringify(rows)}::text::jsonb) as row(
      id uuid, uuid text, index integer, model text, serial text, pci_bus_id text, memory_bytes bigint,
      inventory jsonb, health text, health_reason text, mig_enabled boolean)
    on conflict (uuid) do update set server_id = excluded.server_id, index = excluded.index, model = excluded.model,
      serial = excluded.serial, pci_bus_id = excluded.pci_bus_id, memory_bytes = excluded.memory_bytes,
      inventory = excluded.inventory, health = excluded.health, health_reason = excluded.health_reason,
      mig_enabled = excluded.mig_enabled, present = true, updated_at = now()`;
  // What cannot read GPUs cannot say that one is gone: only an answer from nvidia-smi is evidence.
  if (blindness(conditions) !== undefined) return { events, goneUuids: [] };
  const gone = await tx<{ id: string; uuid: string }[]>`
    update gpus set present = false, health = 'unknown', health_reason = 'not reported', updated_at = now()
    where server_id = ${serverId} and present and not (uuid = any(${rows.map((row) => row.uuid)}))
    returning id, uuid`;
  for (const gpu of gone) {
    events.push({
      type: "gpu.missing",
      severity: "error",
      serverId,
      gpuId: gpu.id,
      actor: `agent:${serverId}`,
      message: `${gpu.uuid} is no longer reported`,
      data: { uuid: gpu.uuid },
    });
  }
  return { events, goneUuids: gone.map((gpu) => gpu.uuid) };
}

/** A GPU's own condition ("gpu-<index>") decides; without one, the state of what reads it. */
function gpuHealth(
  gpu: GpuInventory,
  conditions: Readonly<Record<string, StoredCondition>>,
): { readonly health: Health; readonly reason: string } {
  const own = conditions[`gpu-${gpu.index}`];
  const stack = blindness(conditions);
  if (own?.status === "failed") return { health: "unhealthy", reason: own.reason };
  if (own?.status === "degraded") return { health: "degraded", reason: own.reason };
  if (stack !== undefined) return { health: "unknown", reason: stack.reason };
  if (own?.status === "unknown") return { health: "unknown", reason: own.reason };
  return { health: "healthy", reason: "" };
}

/**
 * Why nothing is known of the GPUs, if so. A degraded stack still reads those that answer, and an absent one is an
 * answer: the host's PCI bus holds no GPU.
 */
function blindness(conditions: Readonly<Record<string, StoredCondition>>): StoredCondition | undefined {
  return [conditions["gpu-driver"], conditions["nvidia-smi"]].find(
    (condition) => condition?.status === "failed" || condition?.status === "unknown",
  );
}

function conditionEvents(
  serverId: string,
  before: Readonly<Record<string, StoredCondition>>,
  after: Readonly<Record<string, StoredCondition>>,
): NewEvent[] {
  const events: NewEvent[] = [];
  for (const [component, condition] of Object.entries(after)) {
    const old = before[component];
    const wasBad = old?.status === "failed" || old?.status === "degraded";
    const isBad = condition.status === "failed" || condition.status === "degraded";
    // What was never bad and is not is no news.
    if (old?.status === condition.status || (!wasBad && !isBad)) continue;
    events.push({
      type: "server.condition-changed",
      severity: condition.status === "failed" ? "error" : isBad ? "warning" : "info",
      serverId,
      actor: `agent:${serverId}`,
      message: `${component}: ${condition.status}${condition.message === "" ? "" : `: ${condition.message}`}`,
      data: { component, from: old?.status ?? null, to: condition.status, reason: condition.reason },
    });
  }
  return events;
}

/** `sql.json` wants its own JSON type; undefined members vanish and NaN becomes null in JSON.stringify. */
function asJson(value: unknown): Record<string, never> {
  return JSON.parse(JSON.stringify(value)) as Record<string, never>;
}
