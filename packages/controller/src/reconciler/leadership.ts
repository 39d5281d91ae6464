import { fullJitterMs } from "@palebluedot/shared/backoff.ts";
import { errorMessage } from "@palebluedot/shared/errors.ts";
import type { Logger } from "@palebluedot/shared/logger.ts";
import type { Sql } from "postgres";

export interface LeadershipOptions {
  readonly sql: Sql;
  /** What is led, such as "scheduler". */
  readonly name: string;
  /** The replica. Stable over a restart, it takes its own old lease over at once. */
  readonly holder: string;
  readonly log: Logger;
  /** Default 6,000. After a crash another replica waits this long. */
  readonly ttlMs?: number;
}

/** One term of office. */
export interface Term {
  /** Grows with every term, over all replicas: a fencing token. */
  readonly token: number;
  /** Aborts when the term is over, at the latest when its lease has run out. */
  readonly signal: AbortSignal;
}

export interface Leadership {
  /** The present term, or undefined. */
  current(): Term | undefined;
  /** Called with each new term. Called at once when there is one. Returns the function that ends it. */
  onTerm(listener: (term: Term) => void): () => void;
  start(): void;
  /** Gives the lease up, so that another replica takes over at once. */
  stop(): Promise<void>;
}

/**
 * At most one replica leads, by a lease in the database that is renewed three times in its life. Time is
 * the database's; locally a term ends a little before its lease does, measured from the moment the renewal
 * was sent, with the monotonic clock. What must hold whatever happens is a constraint, not this.
 */
export function createLeadership(options: LeadershipOptions): Leadership {
  const { sql, name, holder, log } = options;
  const ttlMs = options.ttlMs ?? 6000;
  const listeners = new Set<(term: Term) => void>();
  let term: { token: number; controller: AbortController; expiry: NodeJS.Timeout } | undefined;
  let timer: NodeJS.Timeout | undefined;
  let running: Promise<void> | undefined;
  let stopped = true;
  let attempt = 0;

  function end(reason: string): void {
    if (term === undefined) return;
    clearTimeout(term.expiry);
    const ended = term;
    term = undefined;
    log.info({ leadership: name, token: ended.token, reason }, "term ended");
    ended.controller.abort(new Error(`leadership of ${name} ended: ${reason}`));
  }

  function expireAt(sentAt: number): NodeJS.Timeout {
    const remaining = Math.max(0, sentAt + ttlMs * 0.9 - performance.now());
    return setTimeout(() => end("the lease could not be renewed in time"), remaining).unref();
  }

  async function acquireOrRenew(): Promise<void> {
    const sentAt = performance.now();
    if (term !== undefined) {
      const held = term;
      const rows = await sql`
        update leader_leases set expires_at = clock_timestamp() + ${ttlMs} * interval '1 millisecond'
        where name = ${name} and holder = ${holder} and token = ${held.token} returning token`;
      if (term !== held) return;
      if (rows.length === 0) {
        end("another replica leads");
        return;
      }
      clearTimeout(held.expiry);
      held.expiry = expireAt(sentAt);
      return;
    }
    const rows = await sql<{ token: number }[]>`
      insert into leader_leases as lease (name, holder, token, expires_at)
      values (${name}, ${holder}, 1, clock_timestamp() + ${ttlMs} * interval '1 millisecond')
      on conflict (name) do update
        set holder = excluded.holder, token = lease.token + 1, expires_at = excluded.expires_at
        where lease.expires_at < clock_timestamp() or lease.holder = excluded.holder
      returning token`;
    const token = rows[0]?.token;
    if (token === undefined || stopped) return;
    const controller = new AbortController();
    term = { token, controller, expiry: expireAt(sentAt) };
    log.info({ leadership: name, token }, "term began");
    for (const listener of listeners) listener({ token, signal: controller.signal });
  }

  async function turn(): Promise<void> {
    try {
      await acquireOrRenew();
      attempt = 0;
      schedule(ttlMs / 3);
    } catch (error) {
      attempt += 1;
      log.warn({ leadership: name, error: errorMessage(error) }, "cannot reach the lease");
      schedule(100 + fullJitterMs(attempt, { baseMs: 100, capMs: ttlMs / 3 }));
    }
  }

  function schedule(delayMs: number): void {
    if (stopped) return;
    timer = setTimeout(() => {
      running = turn();
    }, delayMs).unref();
  }

  return {
    current: () => (term === undefined ? undefined : { token: term.token, signal: term.controller.signal }),
    onTerm(listener) {
      listeners.add(listener);
      if (term !== undefined) listener({ token: term.token, signal: term.controller.signal });
      return () => {
        listeners.delete(listener);
      };
    },
    start() {
      if (!stopped) return;
      stopped = false;
      schedule(0);
    },
    async stop() {
      if (stopped) return;
      stopped = true;
      clearTimeout(timer);
      await running;
      const token = term?.token;
      end("stopped");
      if (token === undefined) return;
      await sql`
        update leader_leases set expires_at = '-infinity' where name = ${name} and token = ${token}
      `.catch((error: unknown) => log.debug({ error: errorMessage(error) }, "lease left to expire"));
    },
  };
}
