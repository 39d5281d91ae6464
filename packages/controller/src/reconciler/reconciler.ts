import type { Clock } from "@palebluedot/shared/clock.ts";
import { fullJitterMs } from "@palebluedot/shared/backoff.ts";
import { errorMessage } from "@palebluedot/shared/errors.ts";
import type { Logger } from "@palebluedot/shared/logger.ts";
import type { Sql } from "postgres";
import { Counter, type Registry } from "prom-client";
import type { Notifications } from "../db/notifications.ts";

/** One thing that is due. */
export interface DueItem {
  readonly key: string;
  /** Failed tries since it last moved on. */
  readonly attempt: number;
  /** Fencing token of this lease: whatever moved the thing meanwhile has raised it. */
  readonly token: number;
}

/** What became of a due item. */
export type Outcome =
  /** Nothing left to do, ever. */
  | { readonly kind: "done" }
  /** Look again then; the count of tries starts over unless `keepAttempt`. */
  | { readonly kind: "wait"; readonly until: Date; readonly keepAttempt?: boolean }
  /** Could not be done; back-off with jitter. */
  | { readonly kind: "failed"; readonly error: string }
  /** A transition has rewritten the queue row itself. */
  | { readonly kind: "moved" };

/**
 * Looks after one kind of thing. Handlers observe first and then act; being called twice for the same
 * state is normal (a lease may run out under a slow handler). Progress lives in the database.
 */
export interface ReconcileHandler {
  readonly kind: string;
  /** Most items taken at once, and so the most that are worked on at the same time here. */
  readonly batchSize: number;
  /** Items without an outcome count as failed. A throw fails all. */
  handle(items: readonly DueItem[]): Promise<ReadonlyMap<string, Outcome>>;
}

export interface ReconcilerOptions {
  readonly sql: Sql;
  readonly clock: Clock;
  readonly log: Logger;
  readonly metrics: Registry;
  readonly notifications?: Notifications;
  readonly handlers: readonly ReconcileHandler[];
  readonly random?: () => number;
  /** Default 1,000. */
  readonly pollMs?: number;
  /** Default 20,000: after a crash its items wait this long. */
  readonly leaseMs?: number;
}

export interface Reconciler {
  /** Takes and handles what is due now, each kind once; returns how many items were handled. */
  runOnce(): Promise<number>;
  /** Looks for due work at once. */
  poke(): void;
  start(): void;
  /** Waits for the handlers that run. */
  stop(): Promise<void>;
}

interface LeasedRow {
  key: string;
  attempt: number;
  lease_token: number;
}

/**
 * Durable work: the table reconcile_queue says what is due when. A worker takes rows by lease and fencing
 * token, skipping those that others hold. Replicas share the work without knowing each other.
 */
export function createReconciler(options: ReconcilerOptions): Reconciler {
  const { sql, clock, log } = options;
  const leaseMs = options.leaseMs ?? 20_000;
  const pollMs = options.pollMs ?? 1000;
  const random = options.random ?? Math.random;
  const handled = counter(
    options.metrics,
    "palebluedot_reconcile_items_total",
    "Due items by what became of them",
    ["kind", "outcome"],
  );
  const stop = new AbortController();
  let wake: (() => void) | undefined;
  let poked = false;
  let loop: Promise<void> | undefined;
  let unlisten: (() => void) | undefined;

  async function take(handler: ReconcileHandler): Promise<DueItem[]> {
    const rows = await sql<LeasedRow[]>`
      update reconcile_queue queue
      set leased_until = clock_timestamp() + ${leaseMs} * interval '1 millisecond', lease_token = lease_token + 1
      from (
        select kind, key from reconcile_queue
        where kind = ${handler.kind} and due_at <= ${new Date(clock.now())}
          and (leased_until is null or leased_until < clock_timestamp())
        order by due_at limit ${handler.batchSize}
        for update skip locked
      ) due
      where queue.kind = due.kind and queue.key = due.key
      returning queue.key, queue.attempt, queue.lease_token`;
    return rows.map((row) => ({ key: row.key, attempt: row.attempt, token: row.lease_token }));
  }

  async function settle(
    kind: string,
    items: readonly DueItem[],
    outcomes: ReadonlyMap<string, Outcome>,
  ): Promise<void> {
    const rows = [];
    for (const item of items) {
      const outcome = outcomes.get(item.key) ?? { kind: "failed" as const, error: "no outcome" };
      handled.inc({ kind, outcome: outcome.kind });
      if (outcome.kind === "moved") continue;
      const failed = outcome.kind === "failed";
      if (failed)
        log.warn({ kind, key: item.key, attempt: item.attempt, error: outcome.error }, "reconcile failed");
      const backOffMs = 250 + fullJitterMs(item.attempt, { baseMs: 500, capMs: 60_000 }, random);
      const until = outcome.kind === "wait" ? outcome.until.getTime() : clock.now() + backOffMs;
      const keepAttempt = outcome.kind === "wait" && outcome.keepAttempt === true;
      rows.push({
        key: item.key,
        token: item.token,
        done: outcome.kind === "done",
        due_at: new Date(until).toISOString(),
        attempt: failed || keepAttempt ? item.attempt + 1 : 0,
        last_error: failed ? outcome.error.slice(0, 1000) : null,
      });
    }
    if (rows.length === 0) return;
    // Rows are locked in the order of their keys, as every writer of this table does.
    await sql`
      with input as (
        select * from jsonb_to_recordset(${JSON.stringify(rows)}::text::jsonb)
          as input(key uuid, token bigint, done boolean, due_at timestamptz, attempt integer, last_error text)
      ), mine as materialized (
        select queue.key, input.done, input.due_at, input.attempt, input.last_error
        from reconcile_queue queue join input on queue.key = input.key and queue.lease_token = input.token
        where queue.kind = ${kind} order by queue.key for update of queue
      ), finished as (
        delete from reconcile_queue queue using mine where queue.kind = ${kind} and queue.key = mine.key and mine.done
      )
      update reconcile_queue queue
      set due_at = mine.due_at, attempt = mine.attempt, last_error = mine.last_error, leased_until = null
      from mine where queue.kind = ${kind} and queue.key = mine.key and not mine.done`;
  }

  async function runHandler(handler: ReconcileHandler): Promise<number> {
    const items = await take(handler);
    if (items.length === 0) return 0;
    let outcomes: ReadonlyMap<string, Outcome>;
    try {
      outcomes = await handler.handle(items);
    } catch (error) {
      const failed: Outcome = { kind: "failed", error: errorMessage(error) };
      outcomes = new Map(items.map((item) => [item.key, failed]));
    }
    await settle(handler.kind, items, outcomes);
    return items.length;
  }

  async function runOnce(): Promise<number> {
    const counts = await Promise.all(options.handlers.map(runHandler));
    return counts.reduce((sum, count) => sum + count, 0);
  }

  async function pause(ms: number): Promise<void> {
    if (poked || stop.signal.aborted) return;
    await new Promise<void>((settled) => {
      const timer = setTimeout(settled, ms);
      timer.unref();
      wake = () => {
        clearTimeout(timer);
        settled();
      };
    });
    wake = undefined;
  }

  async function run(): Promise<void> {
    let failures = 0;
    while (!stop.signal.aborted) {
      poked = false;
      try {
        const count = await runOnce();
        failures = 0;
        if (count > 0) continue;
        await pause(pollMs);
      } catch (error) {
        failures += 1;
        log.warn({ error: errorMessage(error) }, "the reconciler cannot reach its queue");
        await pause(100 + fullJitterMs(failures, { baseMs: 200, capMs: 5000 }, random));
      }
    }
  }

  function poke(): void {
    poked = true;
    wake?.();
  }

  return {
    runOnce,
    poke,
    start() {
      if (loop !== undefined) return;
      unlisten = options.notifications?.listen("queue", poke, poke);
      loop = run();
    },
    async stop() {
      stop.abort();
      unlisten?.();
      wake?.();
      await loop;
    },
  };
}

/** The registry's counter of that name, made when missing: features may be built twice on one registry. */
function counter<T extends string>(
  registry: Registry,
  name: string,
  help: string,
  labelNames: readonly T[],
): Counter<T> {
  const existing = registry.getSingleMetric(name);
  if (existing !== undefined) return existing as Counter<T>;
  return new Counter({ name, help, labelNames: [...labelNames], registers: [registry] });
}
