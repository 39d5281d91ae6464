import type { Hello } from "@palebluedot/shared/generated/palebluedot/agent/v1/agent.ts";
import type { Sql } from "postgres";
import { uuidv7 } from "uuidv7";
import { appendEvents } from "../events/outbox.ts";

/** What a new session needs to know, from one statement. */
export interface StartedSession {
  readonly epoch: number;
  readonly serverName: string;
  readonly state: string;
  readonly inventorySha256: string | null;
  readonly gpuUuids: readonly string[];
  readonly lastEventSequence: number;
  /** Replica that held the server's previous session, if that never ended. */
  readonly previousReplica: string | null;
  readonly previousBootId: string | null;
  /** Capacity came back, or is seen for the first time. */
  readonly wasUnreachable: boolean;
}

/**
 * Opens a session: checks certificate and server, raises the epoch (which fences every older session), clears
 * `unreachable`, and tells of it if it is news. Undefined: the certificate is revoked or unknown, or the
 * server is retired.
 */
export async function startSession(
  sql: Sql,
  session: {
    readonly serverId: string;
    readonly certificateSerial: string;
    readonly remoteAddress: string | null;
    readonly replicaId: string;
    readonly hello: Hello;
  },
): Promise<StartedSession | undefined> {
  const { hello } = session;
  const version = hello.agentVersion.replace(/[\p{Cc}]/gu, "").slice(0, 64);
  const bootId = hello.bootId.replace(/[^0-9a-zA-Z-]/g, "").slice(0, 64);
  const journalId = hello.journalId.slice(0, 64);
  const capabilities = hello.capabilities
    .slice(0, 64)
    .map((name) => name.replace(/[^a-z0-9-]/g, "").slice(0, 64));
  const [row] = await sql<StartedSession[]>`
    with old as (
      select id, state, session_replica, boot_id, inventory->>'sha256' as inventory_sha256,
        (conditions ? 'unreachable' or connected_at is null) as was_unreachable
      from servers
      where id = ${session.serverId} and state <> 'retired' and exists (
        select 1 from certificates
        where serial = ${session.certificateSerial} and server_id = ${session.serverId} and revoked_at is null)
      for update
    ), told as (
      insert into outbox (id, type, server_id, actor, message)
      select ${uuidv7()}::uuid, 'server.connected', id, 'agent:' || id, 'the agent is connected' from old where was_unreachable
      union all
      select ${uuidv7()}::uuid, 'server.rebooted', id, 'agent:' || id, 'the host was rebooted' from old
      where boot_id <> ${bootId} and ${bootId} <> ''
    )
    update servers s set session_epoch = s.session_epoch + 1, session_replica = ${session.replicaId},
      connected_at = now(), disconnected_at = null, conditions = s.conditions - 'unreachable',
      agent_version = ${version}, agent_capabilities = ${capabilities}, boot_id = ${bootId},
      session_address = ${session.remoteAddress}, updated_at = now()
    from old where s.id = old.id
    returning s.session_epoch::float8 as epoch, s.name as "serverName", s.state, old.inventory_sha256 as "inventorySha256",
      array(select uuid from gpus where server_id = s.id and present) as "gpuUuids",
      coalesce((select last_sequence from agent_event_cursors
        where server_id = s.id and journal_id = ${journalId}), 0)::float8 as "lastEventSequence",
      old.session_replica as "previousReplica", old.boot_id as "previousBootId", old.was_unreachable as "wasUnreachable"`;
  return row;
}

/** Marks sessions as ended, where no newer one took their place. One statement for any number. */
export async function endSessions(
  sql: Sql,
  ended: readonly { readonly serverId: string; readonly epoch: number }[],
): Promise<void> {
  if (ended.length === 0) return;
  await sql`
    update servers s set session_replica = null, disconnected_at = now()
    from unnest(${ended.map((one) => one.serverId)}::uuid[], ${ended.map((one) => one.epoch)}::bigint[]) as gone(id, epoch)
    where s.id = gone.id and s.session_epoch = gone.epoch`;
}

/**
 * Servers whose agent has been away longer than the grace get the condition `unreachable`, with an event.
 * Safe to run at every replica: an update takes each row once. Returns their ids.
 */
export async function markUnreachable(sql: Sql, graceMs: number): Promise<readonly string[]> {
  return await sql.begin(async (tx) => {
    const rows = await tx<{ id: string; name: string; since: Date }[]>`
      update servers set updated_at = now(), conditions = conditions || jsonb_build_object('unreachable', jsonb_build_object(
        'status', 'failed', 'reason', 'agent-disconnected', 'message', 'the agent is not connected', 'since', disconnected_at))
      where session_replica is null and disconnected_at < now() - make_interval(secs => ${graceMs / 1000})
        and not conditions ? 'unreachable' and state not in ('pending', 'retired')
      returning id, name, disconnected_at as since`;
    await appendEvents(
      tx,
      rows.map((row) => ({
        type: "server.disconnected",
        severity: "warning" as const,
        serverId: row.id,
        message: `${row.name}: the agent has been away since ${row.since.toISOString()}`,
        data: { since: row.since.toISOString() },
      })),
    );
    return rows.map((row) => row.id);
  });
}

const leasePrefix = "replica:";

/** Says that this replica lives: its sessions count. `ttlMs` after the last call they are given up. */
export async function renewReplicaLease(sql: Sql, replicaId: string, ttlMs: number): Promise<void> {
  await sql`
    insert into leader_leases (name, holder, token, expires_at)
    values (${leasePrefix + replicaId}, ${replicaId}, 1, now() + make_interval(secs => ${ttlMs / 1000}))
    on conflict (name) do update set expires_at = excluded.expires_at, token = leader_leases.token + 1`;
}

export async function dropReplicaLease(sql: Sql, replicaId: string): Promise<void> {
  await sql`delete from leader_leases where name = ${leasePrefix + replicaId}`;
}

/** Sessions of replicas that died without saying so: their servers start their grace now. */
export async function releaseDeadReplicas(sql: Sql): Promise<void> {
  await sql`
    update servers set session_replica = null, disconnected_at = now()
    where session_replica is not null and not exists (
      select 1 from leader_leases l where l.name = ${leasePrefix} || session_replica and l.expires_at > now())`;
  await sql`
    delete from leader_leases where name like ${`${leasePrefix}%`} and expires_at < now() - interval '1 hour'`;
}

/** Sessions this replica believes in, as its last process left them. */
export async function releaseOwn(sql: Sql, replicaId: string): Promise<void> {
  await sql`
    update servers set session_replica = null, disconnected_at = now() where session_replica = ${replicaId}`;
}

/** Which of these sessions lost their right to exist: fenced by a newer epoch, or revoked. */
export async function findStale(
  sql: Sql,
  sessions: readonly { readonly serverId: string; readonly epoch: number; readonly serial: string }[],
): Promise<
  readonly { readonly serverId: string; readonly epoch: number; readonly why: "fenced" | "revoked" }[]
> {
  if (sessions.length === 0) return [];
  return await sql<{ serverId: string; epoch: number; why: "fenced" | "revoked" }[]>`
    select mine.server_id as "serverId", mine.epoch::float8 as epoch,
      case when c.revoked_at is not null or s.state = 'retired' then 'revoked' else 'fenced' end as why
    from unnest(${sessions.map((one) => one.serverId)}::uuid[], ${sessions.map((one) => one.epoch)}::bigint[],
      ${sessions.map((one) => one.serial)}::text[]) as mine(server_id, epoch, serial)
    join servers s on s.id = mine.server_id left join certificates c on c.serial = mine.serial
    where s.session_epoch > mine.epoch or c.revoked_at is not null or s.state = 'retired'`;
}
