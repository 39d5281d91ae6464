import type { Sql } from "postgres";
import { natsCursorName } from "./nats-sink.ts";

const purgeBatchSize = 10_000;

export interface PurgeEventsOptions {
  /** Events recorded before this moment go. */
  readonly olderThan: Date;
  /** Keeps what NATS has not acknowledged, however old. */
  readonly keepUnpublished: boolean;
}

/** Deletes old events in batches, oldest first; returns how many. Repeating it is safe. */
export async function purgeEvents(sql: Sql, options: PurgeEventsOptions): Promise<number> {
  let total = 0;
  for (;;) {
    const result = await sql`
      delete from events where seq in (
        select seq from events
        where recorded_at < ${options.olderThan}
        ${options.keepUnpublished ? sql`and seq <= coalesce((select seq from event_cursors where name = ${natsCursorName}), 0)` : sql``}
        order by seq limit ${purgeBatchSize}
      )`;
    total += result.count;
    if (result.count < purgeBatchSize) return total;
  }
}
