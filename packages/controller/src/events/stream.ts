import { setTimeout as delay } from "node:timers/promises";
import type { Logger } from "@palebluedot/shared/logger.ts";
import { errorMessage } from "@palebluedot/shared/errors.ts";
import type { Sql } from "postgres";
import type { Notifications } from "../db/notifications.ts";
import { listEvents, matchesFilter, type EventFilter, type EventRow } from "./event-row.ts";
import { readHead } from "./sequencer.ts";

export interface SubscribeOptions {
  /** Resume after this `seq`; absent: only what comes from now on. */
  readonly afterSeq?: number;
  readonly filter?: EventFilter;
  /** Ends the iteration (no error). */
  readonly signal?: AbortSignal;
}

export interface EventStream {
  /**
   * Catches up from the database, then follows live, without gap or duplicate, in `seq` order. A slow
   * reader costs no memory: it falls back to reading pages. Survives a database outage by waiting. An
   * `afterSeq` beyond the end (a restored database) is taken as the end; events already purged are skipped.
   */
  subscribe(options: SubscribeOptions): AsyncIterable<EventRow>;
  /** Look for new events now. */
  poke(): void;
  subscribers(): number;
  close(): Promise<void>;
}

export interface EventStreamOptions {
  readonly sql: Sql;
  readonly log: Logger;
  readonly notifications: Notifications;
  /** Newest events kept in memory for all subscribers together. */
  readonly ringEvents?: number;
  /** Approximate bound on the ring's memory. */
  readonly ringBytes?: number;
  /** Hints may be lost; the stream is read at least this often while somebody listens. */
  readonly pollMs?: number;
}

const pageSize = 500;
/** After a failed read of the database. */
const retryMs = 1000;

/** Newest part of the stream, contiguous: `head - events.length + 1 .. head`. */
interface Ring {
  head: number;
  events: { readonly event: EventRow; readonly bytes: number }[];
  bytes: number;
}

/**
 * One reader per process: new events are read once and kept in one ring; a subscriber is only a position
 * in it. That a `seq` has no gaps is what makes "ring or database" a comparison of two numbers.
 */
export function createEventStream(options: EventStreamOptions): EventStream {
  const { sql, log, notifications } = options;
  const ringEvents = options.ringEvents ?? 4096;
  const ringBytes = options.ringBytes ?? 16 * 1024 * 1024;
  const pollMs = options.pollMs ?? 1000;
  const closing = new AbortController();
  let ring: Ring | undefined;
  let subscriberCount = 0;
  let running: Promise<void> | undefined;
  let again = false;
  /** Wakes each subscriber that is at the end of the stream. */
  const waiting = new Set<() => void>();
  let pollTimer: NodeJS.Timeout | undefined;

  function append(to: Ring, event: EventRow): void {
    if (event.seq <= to.head) return;
    if (event.seq !== to.head + 1) {
      // Purged under us: the ring must stay contiguous.
      to.events = [];
      to.bytes = 0;
    }
    const bytes = 400 + event.message.length * 2 + JSON.stringify(event.data).length * 2;
    to.events.push({ event, bytes });
    to.bytes += bytes;
    to.head = event.seq;
    while (to.events.length > ringEvents || (to.bytes > ringBytes && to.events.length > 1)) {
      to.bytes -= to.events.shift()?.bytes ?? 0;
    }
  }

  async function readNew(): Promise<void> {
    const current = ring ?? { head: await readHead(sql), events: [], bytes: 0 };
    ring = current;
    for (;;) {
      const rows = await listEvents(sql, { afterSeq: current.head, limit: pageSize });
      for (const row of rows) append(current, row);
      if (rows.length > 0) for (const wake of waiting) wake();
      if (rows.length < pageSize) return;
    }
  }

  /** Runs one read at a time; a call during a read makes it read once more. */
  function refresh(): Promise<void> {
    again = true;
    running ??= (async () => {
      try {
        while (again) {
          again = false;
          await readNew();
        }
      } finally {
        running = undefined;
        if (subscriberCount === 0) ring = undefined;
      }
    })();
    return running;
  }

  function poke(): void {
    if (subscriberCount === 0 || closing.signal.aborted) return;
    refresh().catch((error: unknown) => {
      log.warn({ error: errorMessage(error) }, "events cannot be read; live streams wait");
    });
  }

  function attach(): void {
    subscriberCount += 1;
    pollTimer ??= setInterval(poke, pollMs).unref();
  }

  function detach(): void {
    subscriberCount -= 1;
    if (subscriberCount > 0) return;
    clearInterval(pollTimer);
    pollTimer = undefined;
    // Nobody reads: the ring would go stale and hold memory.
    ring = undefined;
  }

  async function refreshUntilDone(signal: AbortSignal): Promise<void> {
    while (!signal.aborted) {
      try {
        await refresh();
        return;
      } catch (error) {
        log.warn({ error: errorMessage(error) }, "events cannot be read; live streams wait");
        await delay(retryMs, undefined, { signal, ref: false }).catch(() => undefined);
      }
    }
  }

  /** Matching events after `position`, and how far that reading reached. */
  async function readPage(
    position: number,
    filter: EventFilter,
    head: number,
  ): Promise<{ events: EventRow[]; position: number }> {
    const events = await listEvents(sql, {
      afterSeq: position,
      beforeSeq: head + 1,
      limit: pageSize,
      filter,
    });
    const last = events.at(-1);
    return { events, position: events.length < pageSize || last === undefined ? head : last.seq };
  }

  async function* follow(request: SubscribeOptions): AsyncGenerator<EventRow, void, undefined> {
    const filter = request.filter ?? {};
    const signal =
      request.signal === undefined ? closing.signal : AbortSignal.any([request.signal, closing.signal]);
    let wake: (() => void) | undefined;
    const onAbort = (): void => wake?.();
    signal.addEventListener("abort", onAbort, { once: true });
    attach();
    try {
      await refreshUntilDone(signal);
      let position = Math.min(request.afterSeq ?? Number.POSITIVE_INFINITY, ring?.head ?? 0);
      while (!signal.aborted) {
        if (ring === undefined) {
          await refreshUntilDone(signal);
          continue;
        }
        if (position >= ring.head) {
          await new Promise<void>((resolve) => {
            wake = resolve;
            waiting.add(resolve);
          });
          if (wake !== undefined) waiting.delete(wake);
          continue;
        }
        const first = ring.head - ring.events.length + 1;
        let batch: EventRow[];
        if (position + 1 >= first) {
          batch = ring.events
            .slice(position + 1 - first, position + 1 - first + pageSize)
            .map((entry) => entry.event);
          position = batch.at(-1)?.seq ?? position;
          batch = batch.filter((event) => matchesFilter(event, filter));
        } else {
          try {
            ({ events: batch, position } = await readPage(position, filter, ring.head));
          } catch (error) {
            log.warn({ error: errorMessage(error) }, "events cannot be read; a subscriber waits");
            await delay(retryMs, undefined, { signal, ref: false }).catch(() => undefined);
            continue;
          }
        }
        for (const event of batch) {
          if (signal.aborted) return;
          yield event;
        }
      }
    } finally {
      signal.removeEventListener("abort", onAbort);
      if (wake !== undefined) waiting.delete(wake);
      detach();
    }
  }

  const unlisten = notifications.listen("events", poke, poke);

  return {
    subscribe: (request) => follow(request),
    poke,
    subscribers: () => subscriberCount,
    async close() {
      unlisten();
      closing.abort();
      clearInterval(pollTimer);
      await running?.catch(() => undefined);
    },
  };
}
