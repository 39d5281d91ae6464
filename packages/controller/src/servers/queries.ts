import { PlatformError } from "@palebluedot/shared/errors.ts";
import type { ServerPool, ServerState } from "@palebluedot/shared/vocabulary.ts";
import type { ISql, Sql } from "postgres";
import { uuidv7 } from "uuidv7";
import { appendEvents } from "../events/outbox.ts";
import type { LabelFilter } from "../http/fields.ts";
import type { ServerRow } from "./view.ts";

export function serverNotFound(id: string): PlatformError {
  return new PlatformError({
    code: "server-not-found",
    kind: "not-found",
    message: `there is no server ${id}`,
    hint: "GET /api/v1/servers lists them.",
  });
}

export interface ServerFilter {
  readonly state?: ServerState | undefined;
  readonly model?: string | undefined;
  readonly connected?: boolean | undefined;
  readonly labels: LabelFilter;
  /** Part of the name, the serial number or an address. */
  readonly q?: string | undefined;
}

const columns = (sql: ISql) => sql`
  s.id, s.name, s.state, s.state_since, s.state_message, s.pool, s.serial, s.smbios_uuid, s.bmc_mac,
  s.bmc_address, s.labels, s.site, s.rack, s.rack_unit, s.conditions, s.agent_version, s.agent_capabilities,
  s.boot_id, s.session_replica, s.connected_at, s.disconnected_at, s.draining, s.desired_generation,
  s.observed_generation, s.created_at, s.updated_at,
  (select array_agg(m.mac order by m.mac) from server_macs m where m.server_id = s.id) as macs,
  (select count(*)::int from gpus g where g.server_id = s.id and g.present) as gpu_count,
  (select count(distinct c.gpu_id)::int from claims c
    where c.server_id = s.id and c.released_at is null) as gpu_claimed_count,
  (select array_agg(distinct g.model) from gpus g where g.server_id = s.id and g.present) as gpu_models`;

/** `%` and `_` of the caller are themselves, not wildcards. */
const likePattern = (text: string): string => `%${text.replaceAll(/[\\%_]/g, "\\$&")}%`;

/** By id (oldest first); `limit` rows after `afterId`. */
export async function listServers(
  sql: Sql,
  filter: ServerFilter,
  afterId: string | undefined,
  limit: number,
): Promise<ServerRow[]> {
  const { labels } = filter;
  return await sql<ServerRow[]>`
    select ${columns(sql)} from servers s
    where true
      ${afterId === undefined ? sql`` : sql`and s.id > ${afterId}`}
      ${filter.state === undefined ? sql`and s.state <> 'retired'` : sql`and s.state = ${filter.state}`}
      ${filter.connected === undefined ? sql`` : sql`and (s.session_replica is not null) = ${filter.connected}`}
      ${filter.model === undefined ? sql`` : sql`and exists (select from gpus g where g.server_id = s.id and g.present and g.model ilike ${likePattern(filter.model)})`}
      ${Object.keys(labels.equal).length === 0 ? sql`` : sql`and s.labels @> ${sql.json(labels.equal)}`}
      ${labels.present.length === 0 ? sql`` : sql`and s.labels ?& ${[...labels.present]}::text[]`}
      ${filter.q === undefined ? sql`` : sql`and (s.name ilike ${likePattern(filter.q)} or s.serial ilike ${likePattern(filter.q)} or s.bmc_address ilike ${likePattern(filter.q)})`}
    order by s.id limit ${limit}`;
}

/** Throws `server-not-found`. */
export async function getServer(
  sql: ISql,
  id: string,
): Promise<ServerRow & { readonly inventory: { host?: unknown } | null }> {
  const rows = await sql<(ServerRow & { inventory: { host?: unknown } | null })[]>`
    select ${columns(sql)}, s.inventory from servers s where s.id = ${id}`;
  const row = rows[0];
  if (row === undefined) throw serverNotFound(id);
  return row;
}

export interface ServerRegistration {
  readonly name: string;
  readonly pool: ServerPool;
  /** Normalised; null when not given. */
  readonly serial: string | null;
  readonly smbiosUuid: string | null;
  readonly macs: readonly string[];
  readonly bmcMac: string | null;
  readonly bmcAddress: string | null;
  readonly labels: Readonly<Record<string, string>>;
  readonly site: string | null;
  readonly rack: string | null;
  readonly rackUnit: number | null;
}

function nameTaken(name: string): PlatformError {
  return new PlatformError({
    code: "server-name-taken",
    kind: "conflict",
    message: `there is a server "${name}" already`,
    hint: "Choose another name, or use the existing server.",
  });
}

/** Makes the record of a server before its agent enrols; it waits in `pending`. Throws `server-name-taken`. */
export async function registerServer(sql: Sql, server: ServerRegistration, actor: string): Promise<string> {
  const id = uuidv7();
  await sql.begin(async (tx) => {
    const inserted = await tx`
      insert into servers (id, name, state, state_message, pool, serial, smbios_uuid, bmc_mac, bmc_address,
                           labels, site, rack, rack_unit)
      values (${id}, ${server.name}, 'pending', 'registered; its agent has not enrolled yet', ${server.pool},
              ${server.serial}, ${server.smbiosUuid}, ${server.bmcMac}, ${server.bmcAddress},
              ${sql.json(server.labels)}, ${server.site}, ${server.rack}, ${server.rackUnit})
      on conflict (name) do nothing returning id`;
    if (inserted.length === 0) throw nameTaken(server.name);
    if (server.macs.length > 0) {
      await tx`
        insert into server_macs (mac, server_id) select mac, ${id}::uuid
        from unnest(${[...new Set(server.macs)]}::text[]) as mac`;
    }
    await appendEvents(tx, [
      {
        type: "server.registered",
        serverId: id,
        actor,
        message: `server "${server.name}" was registered before its agent`,
        data: { name: server.name },
      },
    ]);
  });
  return id;
}

export interface ServerChange {
  readonly name?: string | undefined;
  readonly labels?: Readonly<Record<string, string>> | undefined;
  readonly site?: string | null | undefined;
  readonly rack?: string | null | undefined;
  readonly rackUnit?: number | null | undefined;
  readonly draining?: boolean | undefined;
}

/**
 * Changes what an operator may change, with an event for it. Draining is part of the desired state, so it
 * starts a new generation. Throws `server-not-found` and `server-name-taken`.
 */
export async function updateServer(sql: Sql, id: string, change: ServerChange, actor: string): Promise<void> {
  await sql.begin(async (tx) => {
    const found = await tx<{ name: string; draining: boolean }[]>`
      select name, draining from servers where id = ${id} for update`;
    const before = found[0];
    if (before === undefined) throw serverNotFound(id);
    if (change.name !== undefined && change.name !== before.name) {
      const taken = await tx`select 1 from servers where name = ${change.name}`;
      if (taken.length > 0) throw nameTaken(change.name);
    }
    const values: Record<string, unknown> = {};
    if (change.name !== undefined) values["name"] = change.name;
    if (change.labels !== undefined) values["labels"] = tx.json(change.labels);
    if (change.site !== undefined) values["site"] = change.site;
    if (change.rack !== undefined) values["rack"] = change.rack;
    if (change.rackUnit !== undefined) values["rack_unit"] = change.rackUnit;
    if (Object.keys(values).length > 0) {
      await tx`update servers set ${tx(values)}, updated_at = now() where id = ${id}`.catch(
        (error: unknown) => {
          // Two renames at once: the unique index is the last word.
          throw uniqueViolation(error) ? nameTaken(change.name ?? "") : error;
        },
      );
    }
    const draining = change.draining ?? before.draining;
    const drainChanged = draining !== before.draining;
    if (drainChanged) {
      const condition = {
        status: "degraded",
        reason: "draining",
        message: "an operator drains this server: nothing new is placed here",
        since: new Date().toISOString(),
      };
      await tx`
        update servers set draining = ${draining},
          desired_generation = desired_generation + 1, updated_at = now(),
          conditions = ${draining ? tx`conditions || ${tx.json({ draining: condition })}` : tx`conditions - 'draining'`}
        where id = ${id}`;
    }
    await appendEvents(tx, [
      {
        type: !drainChanged ? "server.updated" : draining ? "server.draining" : "server.undrained",
        serverId: id,
        actor,
        message: `server "${change.name ?? before.name}" was changed`,
        data: {
          changed: Object.keys(change).filter((key) => change[key as keyof ServerChange] !== undefined),
        },
      },
    ]);
  });
}

export function uniqueViolation(error: unknown): boolean {
  return error instanceof Error && "code" in error && error.code === "23505";
}
