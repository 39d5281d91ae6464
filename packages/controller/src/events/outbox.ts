import type { ISql } from "postgres";
import { uuidv7 } from "uuidv7";
import type { NewEvent } from "./types.ts";

/**
 * The transactional outbox. An event is appended in the transaction that makes it true, and the relay
 * (relay.ts) later moves it to `events`, where it gets its place in the stream.
 *
 * A feature that changes rows and tells of it in one statement may insert into `outbox` from its own CTE:
 *
 *     insert into outbox (id, type, severity, tenant_id, server_id, gpu_id, allocation_id, actor, message, data)
 *
 * `id` is a UUIDv7 made by the writer (uuidv7() of PostgreSQL 18 does too), `type` is dotted lower case
 * ("allocation.active"), `severity` is info | warning | error, `data` is a JSON object with snake_case keys;
 * severity, actor, message, data and occurred_at have defaults. Text from outside goes through
 * `storableText` first: PostgreSQL stores no NUL.
 */

/** Characters; a longer message is cut. Messages are for people. */
export const maxMessageCharacters = 4096;
/** Characters of JSON; larger data is replaced by a note, so that an event never breaks the change it tells of. */
export const maxDataCharacters = 65_536;

/** What PostgreSQL's text and jsonb cannot hold (NUL, lone surrogates) replaced by U+FFFD. */
export function storableText(text: string): string {
  return text.replaceAll("\0", "\uFFFD").toWellFormed();
}

function storableMember(_key: string, value: unknown): unknown {
  if (typeof value === "string") return storableText(value);
  if (typeof value !== "object" || value === null || Array.isArray(value)) return value;
  const keys = Object.keys(value);
  if (keys.every((key) => key === storableText(key))) return value;
  return Object.fromEntries(Object.entries(value).map(([key, member]) => [storableText(key), member]));
}

function storableData(data: Readonly<Record<string, unknown>>): unknown {
  const json = JSON.stringify(data, storableMember);
  if (json.length > maxDataCharacters) return { truncated: true, characters: json.length };
  return JSON.parse(json);
}

/**
 * Appends events in the caller's transaction (or on its own with a plain connection pool): one statement,
 * whatever their number. Throws what the database throws; an empty list does nothing. The relay notices by
 * polling; `EventFeature.poke` after the commit makes it look at once.
 */
export async function appendEvents(sql: ISql, events: readonly NewEvent[]): Promise<void> {
  if (events.length === 0) return;
  const now = new Date();
  const rows = events.map((event) => ({
    id: event.id ?? uuidv7(),
    type: event.type,
    severity: event.severity ?? "info",
    tenant_id: event.tenantId ?? null,
    server_id: event.serverId ?? null,
    gpu_id: event.gpuId ?? null,
    allocation_id: event.allocationId ?? null,
    actor: event.actor ?? "system",
    message: storableText((event.message ?? "").slice(0, maxMessageCharacters)),
    data: event.data === undefined ? {} : storableData(event.data),
    occurred_at: (event.occurredAt ?? now).toISOString(),
  }));
  // One text parameter instead of eleven per row: the statement is prepared once for every batch size.
  await sql`
    insert into outbox (id, type, severity, tenant_id, server_id, gpu_id, allocation_id, actor, message, data, occurred_at)
    select id, type, severity, tenant_id, server_id, gpu_id, allocation_id, actor, message, data, occurred_at
    from jsonb_to_recordset(${JSON.stringify(rows)}::text::jsonb) as row(
      id uuid, type text, severity text, tenant_id uuid, server_id uuid, gpu_id uuid, allocation_id uuid,
      actor text, message text, data jsonb, occurred_at timestamptz
    )`;
}
