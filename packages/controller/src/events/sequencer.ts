import type { Sql } from "postgres";

/** Rows moved in one transaction; bounds the transaction's time and the relay's memory. */
export const sequencerBatchSize = 1000;

/**
 * Moves one batch from the outbox into the stream and gives each event its `seq`, gap-free.
 *
 * Ids and sequence values say when a row was made, not when it was committed: a relay that reads "id
 * greater than the last" misses the row of a slow transaction. Here a row is taken when it is visible,
 * whatever its id. The row lock on the cursor serialises sequencers, so two processes that both think
 * they lead still number correctly; leadership only saves the waiting.
 *
 * Returns how many rows moved and the last `seq` given out.
 */
export async function sequenceOutbox(
  sql: Sql,
  batchSize: number = sequencerBatchSize,
): Promise<{ moved: number; lastSeq: number }> {
  const [result] = await sql<{ moved: number; seq: number }[]>`
    with head as materialized (
      select seq from event_cursors where name = 'sequence' for update
    ), batch as materialized (
      select id from outbox where (select count(*) from head) > 0 order by id limit ${batchSize}
    ), taken as (
      delete from outbox where id = any(array(select id from batch)) returning *
    ), placed as (
      insert into events (seq, id, type, severity, tenant_id, server_id, gpu_id, allocation_id, actor, message, data, occurred_at)
      select (select seq from head) + row_number() over (order by id), id, type, severity, tenant_id, server_id,
             gpu_id, allocation_id, actor, message, data, occurred_at
      from taken
      returning seq
    ), moved as (
      select count(*)::int as count from placed
    ), advanced as (
      update event_cursors set seq = seq + moved.count from moved where name = 'sequence' and moved.count > 0
    )
    select moved.count as moved, head.seq + moved.count as seq from moved, head`;
  if (result === undefined) throw new Error("the cursor of the event stream is gone");
  return { moved: result.moved, lastSeq: result.seq };
}

/** The last `seq` given out. */
export async function readHead(sql: Sql): Promise<number> {
  const [row] = await sql<{ seq: number }[]>`select seq from event_cursors where name = 'sequence'`;
  return row?.seq ?? 0;
}
