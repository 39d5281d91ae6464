import type { DurableEvent } from "@palebluedot/shared/generated/palebluedot/agent/v1/agent.ts";
import type { Sql, TransactionSql } from "postgres";
import { appendEvents } from "../events/outbox.ts";
import type { NewEvent } from "../events/types.ts";

/** What agents may tell of; anything else is filed under "agent." so that it passes for nothing of ours. */
const agentEventType = /^(gpu|container|workload|agent|host|journal|nvidia-smi)(\.[a-z0-9-]{1,48}){1,3}$/;

const severities: Readonly<Record<string, NewEvent["severity"]>> = {
  "gpu.xid": "warning",
  "gpu.sxid": "warning",
  "gpu.lost": "error",
  "gpu.recovery-action": "error",
  "container.oom-killed": "warning",
  "workload.refused": "warning",
  "workload.failed": "warning",
  "journal.overflow": "error",
};

const maxDataBytes = 16 * 1024;
/** An agent with a new journal at every start must not grow the table. */
const journalsPerServer = 4;
export const maxEventsPerBatch = 1000;

/**
 * Puts an agent's events into the outbox and moves its journal's cursor, in one transaction: what was sent
 * twice is stored once. Returns the sequence that the agent may forget. A session with an older epoch writes
 * nothing (undefined): the newer one is sent the same events.
 */
export async function ingestEvents(
  sql: Sql,
  session: { readonly serverId: string; readonly epoch: number },
  journalId: string,
  events: readonly DurableEvent[],
): Promise<number | undefined> {
  const { serverId } = session;
  return await sql.begin(async (tx) => {
    const [server] = await tx`
      select 1 from servers where id = ${serverId} and session_epoch = ${session.epoch} for share`;
    if (server === undefined) return undefined;
    await tx`
      insert into agent_event_cursors (server_id, journal_id, last_sequence) values (${serverId}, ${journalId}, 0)
      on conflict do nothing`;
    const [cursor] = await tx<{ last_sequence: number }[]>`
      select last_sequence::float8 as last_sequence from agent_event_cursors
      where server_id = ${serverId} and journal_id = ${journalId} for update`;
    let last = cursor?.last_sequence ?? 0;
    const fresh: DurableEvent[] = [];
    for (const event of events) {
      if (event.sequence <= last) continue;
      last = event.sequence;
      fresh.push(event);
    }
    if (fresh.length === 0) return last;
    await appendEvents(tx, await resolve(tx, serverId, fresh));
    await tx`
      update agent_event_cursors set last_sequence = ${last}, updated_at = now()
      where server_id = ${serverId} and journal_id = ${journalId}`;
    if (cursor?.last_sequence === 0) {
      await tx`
        delete from agent_event_cursors where server_id = ${serverId} and journal_id <> ${journalId}
          and journal_id not in (
            select journal_id from agent_event_cursors where server_id = ${serverId}
            order by updated_at desc limit ${journalsPerServer})`;
    }
    return last;
  });
}

/** Names in an event count only where the database agrees that they are this server's. */
async function resolve(
  tx: TransactionSql,
  serverId: string,
  events: readonly DurableEvent[],
): Promise<NewEvent[]> {
  const uuids = [...new Set(events.map((event) => event.gpuUuid).filter((uuid) => uuid !== ""))];
  const allocationIds = [...new Set(events.map((event) => event.allocationId).filter(isUuid))];
  const gpus =
    uuids.length === 0
      ? []
      : await tx<{ id: string; uuid: string }[]>`
          select id, uuid from gpus where server_id = ${serverId} and uuid = any(${uuids})`;
  const allocations =
    allocationIds.length === 0
      ? []
      : await tx<{ id: string; tenant_id: string }[]>`
          select id, tenant_id from allocations where server_id = ${serverId} and id = any(${allocationIds}::uuid[])`;
  const gpuIds = new Map(gpus.map((gpu) => [gpu.uuid, gpu.id]));
  const tenants = new Map(allocations.map((allocation) => [allocation.id, allocation.tenant_id]));
  return events.map((event): NewEvent => {
    const tenantId = tenants.get(event.allocationId);
    return {
      type: eventType(event.type),
      severity: severities[event.type] ?? "info",
      serverId,
      gpuId: gpuIds.get(event.gpuUuid) ?? null,
      allocationId: tenantId === undefined ? null : event.allocationId,
      tenantId: tenantId ?? null,
      actor: `agent:${serverId}`,
      message: event.message.replace(/[\p{Cc}\p{Cf}]/gu, " "),
      data: eventData(event.dataJson),
      occurredAt: new Date(Math.min(Math.max(0, event.timeUnixMs), 253_402_300_799_000)),
    };
  });
}

function eventType(type: string): string {
  if (agentEventType.test(type)) return type;
  const word = type
    .toLowerCase()
    .replace(/[^a-z0-9-]+/g, "-")
    .slice(0, 48);
  return `agent.other${word === "" ? "" : `.${word}`}`;
}

function eventData(json: string): Record<string, unknown> {
  if (json === "") return {};
  if (json.length > maxDataBytes) return { truncated: true, characters: json.length };
  try {
    const value: unknown = JSON.parse(json);
    return typeof value === "object" && value !== null && !Array.isArray(value)
      ? (value as Record<string, unknown>)
      : { value };
  } catch {
    return { unparsable: true, characters: json.length };
  }
}

function isUuid(text: string): boolean {
  return /^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$/.test(text);
}
