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
  return await sql.begin(async (tx) => {
    const [cursor] = await tx<{ seq: number }[]>`
      select seq from event_cursors where name = 'sequence' for update`;
    const lastSeq = cursor?.seq ?? 0;
    const [result] = await tx<{ moved: number }[]>`
      with batch as (
        select id from outbox order by id limit ${batchSize}
      ), taken as (
        delete from outbox using batch where outbox.id = batch.id returning outbox.*
      ), placed as (
        insert into events (seq, id, type, severity, tenant_id, server_id, gpu_id, allocation_id, actor, message, data, occurred_at)
        select ${lastSeq}::bigint + row_number() over (order by id), id, type, severity, tenant_id, server_id,
               gpu_id, allocation_id, actor, message, data, occurred_at
        from taken
        returning 1
      )
      select count(*)::int as moved from placed`;
    const moved = result?.moved ?? 0;
    if (moved > 0) {
      await tx`
        insert into event_cursors (name, seq) values ('sequence', ${lastSeq + moved})
        on conflict (name) do update set seq = excluded.seq`;
    }
    return { moved, lastSeq: lastSeq + moved };
  });
}

/** The last `seq` given out. */
export async function readHead(sql: Sql): Promise<number> {
  const [row] = await sql<{ seq: number }[]>`select seq from event_cursors where name = 'sequence'`;
  return row?.seq ?? 0;
}
