import type { Sql } from "postgres";

/**
 * What must be true of the database at every moment, each as a query that finds what breaks it. They know
 * nothing of the constraints: with a constraint dropped they are what notices.
 */
export const databaseInvariants: Readonly<Record<string, (sql: Sql) => Promise<readonly unknown[]>>> = {
  "no GPU slot is claimed twice": (sql) => sql`
    select a.gpu_id, a.allocation_id, b.allocation_id as other from claims a join claims b
      on a.gpu_id = b.gpu_id and a.id < b.id and a.slots && b.slots and a.lane && b.lane
    where a.released_at is null and b.released_at is null`,

  "live claims on a GPU have one mode": (sql) => sql`
    select gpu_id from claims where released_at is null and gpu_id is not null
    group by gpu_id having count(distinct mode) > 1`,

  "one media extension on a GPU": (sql) => sql`
    select gpu_id from claims where released_at is null and media_extension group by gpu_id having count(*) > 1`,

  "a server used as a whole is used by one allocation alone": (sql) => sql`
    select server_id from claims where released_at is null
    group by server_id having max(server_exclusive) = 1 and count(distinct allocation_id) > 1`,

  "a live claim is on a GPU of its server": (sql) => sql`
    select claims.id from claims join gpus on gpus.id = claims.gpu_id
    where claims.released_at is null and gpus.server_id <> claims.server_id`,
  "claims are of well-formed ranges": (sql) => sql`
    select id from claims
    where isempty(slots) or isempty(lane) or (mode = 'whole' and (slots <> '[0,)' or lane <> '[0,)'))
      or (mode = 'mig' and upper_inf(slots)) or (mode = 'share' and upper_inf(lane))`,

  "claims are released only after their use ended": (sql) => sql`
    select id from claims where released_at is not null and usage_ended_at is null`,

  "an allocation with GPUs has all of them, on its server, live": (sql) => sql`
    select allocation.id, allocation.state from allocations allocation
    where allocation.state in ('scheduled', 'provisioning', 'active', 'releasing')
      and (allocation.request -> 'gpus' ->> 'count')::int <> (
        select count(*) from claims join gpus on gpus.id = claims.gpu_id and gpus.server_id = claims.server_id
        where claims.allocation_id = allocation.id and claims.released_at is null
          and claims.server_id = allocation.server_id)`,

  "what waits or is over claims nothing": (sql) => sql`
    select allocation.id, allocation.state from allocations allocation
    where allocation.state in ('queued', 'ended') and exists (
      select from claims where claims.allocation_id = allocation.id and claims.released_at is null)`,

  "what is being released is not paid any more": (sql) => sql`
    select claims.id from claims join allocations on allocations.id = claims.allocation_id
    where (allocations.state in ('releasing', 'ended')) <> (claims.usage_ended_at is not null)`,

  "everything that lives is in the reconciler's queue, and nothing else": (sql) => sql`
    select coalesce(allocation.id, queue.key) as id, allocation.state
    from (select * from allocations where state <> 'ended') allocation
    full join (select * from reconcile_queue where kind = 'allocation') queue on queue.key = allocation.id
    where queue.key is null or allocation.id is null`,

  "each state is entered at most once, and told once": (sql) => sql`
    select allocation_id, type, count(*) from outbox
    where type in ('allocation.queued', 'allocation.scheduled', 'allocation.provisioning', 'allocation.active',
      'allocation.releasing', 'allocation.ended')
    group by allocation_id, type having count(*) > 1`,

  "the last state that was told is the state": (sql) => sql`
    select allocation.id, allocation.state from allocations allocation
    where not exists (
      select from outbox where outbox.allocation_id = allocation.id and outbox.type = 'allocation.' || allocation.state)`,

  "secrets of what is over are gone": (sql) => sql`
    select id from allocations where state = 'ended' and secrets_encrypted is not null`,
};

/** The broken invariants, each with what breaks it. */
export async function brokenInvariants(sql: Sql): Promise<string[]> {
  const broken: string[] = [];
  for (const [name, query] of Object.entries(databaseInvariants)) {
    const rows = await query(sql);
    if (rows.length > 0) broken.push(`${name}: ${JSON.stringify(rows.slice(0, 3))}`);
  }
  return broken;
}
