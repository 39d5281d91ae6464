import { randomUUID } from "node:crypto";
import { setTimeout as delay } from "node:timers/promises";
import { systemClock, type Clock } from "@palebluedot/shared/clock.ts";
import { createLogger } from "@palebluedot/shared/logger.ts";
import { Registry } from "prom-client";
import { afterAll, beforeAll, beforeEach, describe, expect, test } from "vitest";
import { createTestDatabase, type TestDatabase } from "../db/testing.ts";
import { createLeadership, type Leadership } from "./leadership.ts";
import { createPeriodicJobs } from "./periodic.ts";
import { createReconciler, type Outcome, type Reconciler, type ReconcileHandler } from "./reconciler.ts";

const log = createLogger({ name: "test", level: "silent" });
let database: TestDatabase;

beforeAll(async () => {
  database = await createTestDatabase();
});
afterAll(() => database.close());
beforeEach(() => database.sql`truncate reconcile_queue, leader_leases`);

async function eventually(check: () => boolean, what: string): Promise<void> {
  for (const deadline = performance.now() + 20_000; performance.now() < deadline; await delay(10)) {
    if (check()) return;
  }
  throw new Error(`did not happen: ${what}`);
}

async function enqueue(kind: string, count: number, dueAt = new Date(0)): Promise<string[]> {
  const keys = Array.from({ length: count }, () => randomUUID());
  for (const key of keys) {
    await database.sql`insert into reconcile_queue (kind, key, due_at) values (${kind}, ${key}, ${dueAt})`;
  }
  return keys;
}

function reconcilerOf(
  handle: ReconcileHandler["handle"],
  options: { clock?: Clock; leaseMs?: number; batchSize?: number } = {},
): Reconciler {
  return createReconciler({
    sql: database.sql,
    clock: options.clock ?? systemClock,
    log,
    metrics: new Registry(),
    random: () => 1,
    leaseMs: options.leaseMs ?? 20_000,
    handlers: [{ kind: "thing", batchSize: options.batchSize ?? 10, handle }],
  });
}

const outcomeForAll =
  (outcome: Outcome): ReconcileHandler["handle"] =>
  (items) =>
    Promise.resolve(new Map(items.map((item) => [item.key, outcome])));

describe("the due queue", () => {
  test("four workers handle each of 200 items exactly once", async () => {
    const keys = await enqueue("thing", 200);
    const seen: string[] = [];
    const workers = [1, 2, 3, 4].map(() =>
      reconcilerOf(
        (items) => {
          seen.push(...items.map((item) => item.key));
          return outcomeForAll({ kind: "done" })(items);
        },
        { batchSize: 7 },
      ),
    );
    await Promise.all(
      workers.map(async (worker) => {
        while ((await worker.runOnce()) > 0);
      }),
    );
    expect(seen.sort()).toEqual(keys.sort());
    expect(await database.sql`select from reconcile_queue`).toHaveLength(0);
  });

  test("what is not due, or of another kind, is left alone", async () => {
    await enqueue("thing", 1, new Date(Date.now() + 60_000));
    await enqueue("other", 1);
    expect(await reconcilerOf(outcomeForAll({ kind: "done" })).runOnce()).toBe(0);
  });

  test("failures back off further each time and keep their error; success starts over", async () => {
    const clock = { ...systemClock, now: () => 1_000_000 };
    const [key = ""] = await enqueue("thing", 1);
    const failing = reconcilerOf(() => Promise.reject(new Error("no luck")), { clock });
    const waits: number[] = [];
    for (let round = 0; round < 3; round += 1) {
      expect(await failing.runOnce()).toBe(1);
      const [row] = await database.sql<{ due_at: Date }[]>`select * from reconcile_queue where key = ${key}`;
      expect(row).toMatchObject({ attempt: round + 1, last_error: "no luck", leased_until: null });
      waits.push((row?.due_at.getTime() ?? 0) - clock.now());
      await database.sql`update reconcile_queue set due_at = ${new Date(0)}`;
    }
    expect(waits).toEqual([750, 1250, 2250]);
    await reconcilerOf(outcomeForAll({ kind: "wait", until: new Date(5) }), { clock }).runOnce();
    const [row] = await database.sql`select attempt, last_error from reconcile_queue`;
    expect(row).toMatchObject({ attempt: 0, last_error: null });
  });

  test("a worker whose lease ran out does not overwrite its successor's word", async () => {
    await enqueue("thing", 1);
    const held = Promise.withResolvers<void>();
    const slow = reconcilerOf(
      async (items) => {
        await held.promise;
        return outcomeForAll({ kind: "done" })(items);
      },
      { leaseMs: 1 },
    );
    const slowRun = slow.runOnce();
    const later = new Date(Date.now() + 3_600_000);
    let successorItems = 0;
    for (const deadline = performance.now() + 10_000; successorItems === 0 && performance.now() < deadline;) {
      successorItems = await reconcilerOf(outcomeForAll({ kind: "wait", until: later })).runOnce();
    }
    expect(successorItems).toBe(1);
    held.resolve();
    await slowRun;
    const rows = await database.sql`select due_at from reconcile_queue`;
    expect(rows).toMatchObject([{ due_at: later }]);
  });

  test("started, it polls by itself and stops cleanly", async () => {
    const reconciler = reconcilerOf(outcomeForAll({ kind: "done" }));
    reconciler.start();
    await enqueue("thing", 3);
    reconciler.poke();
    for (const deadline = performance.now() + 10_000; performance.now() < deadline; await delay(20)) {
      if ((await database.sql`select from reconcile_queue`).length === 0) break;
    }
    expect(await database.sql`select from reconcile_queue`).toHaveLength(0);
    await reconciler.stop();
  });
});

const leader = (holder: string, ttlMs = 6000): Leadership =>
  createLeadership({ sql: database.sql, name: "test", holder, log, ttlMs });

describe("leadership", () => {
  test("one of three leads; a stop hands over at once with a higher token", async () => {
    const candidates = ["a", "b", "c"].map((holder) => leader(holder, 900));
    for (const candidate of candidates) candidate.start();
    const leading = (): typeof candidates =>
      candidates.filter((candidate) => candidate.current() !== undefined);
    await eventually(() => leading().length === 1, "a leader");
    const first = leading()[0];
    const term = first?.current();
    await first?.stop();
    expect(term?.signal.aborted).toBe(true);
    await eventually(() => leading().length === 1, "a second leader");
    expect(leading()[0]?.current()?.token).toBeGreaterThan(term?.token ?? Infinity);
    for (const candidate of candidates) await candidate.stop();
  });

  test("a crashed leader's lease runs out; the same replica takes its own over at once", async () => {
    await database.sql`insert into leader_leases values ('test', 'dead', 7, clock_timestamp() + interval '1 hour')`;
    const other = leader("other", 600);
    other.start();
    await delay(300);
    expect(other.current()).toBeUndefined();
    const same = leader("dead", 600);
    same.start();
    await eventually(() => same.current()?.token === 8, "same replica leads");
    await database.sql`update leader_leases set expires_at = '-infinity', holder = 'nobody'`;
    await eventually(() => same.current() === undefined || same.current()?.token !== 8, "fenced");
    await other.stop();
    await same.stop();
  });

  test("a leader that cannot renew stops by itself when its lease runs out", async () => {
    const own = await createTestDatabase();
    const candidate = createLeadership({ sql: own.sql, name: "test", holder: "a", log, ttlMs: 600 });
    candidate.start();
    await eventually(() => candidate.current() !== undefined, "leads");
    const term = candidate.current();
    // Renewals now wait for this lock.
    const locked = await own.sql.reserve();
    await locked`begin`;
    await locked`lock table leader_leases`;
    await eventually(() => candidate.current() === undefined, "stood down");
    expect(term?.signal.aborted).toBe(true);
    await locked`rollback`;
    locked.release();
    await candidate.stop();
    await own.close();
  });
});

describe("periodic jobs", () => {
  test("run by the clock where the replica leads, never twice at once, and survive a failure", async () => {
    let running = 0;
    let most = 0;
    let runs = 0;
    let leads = false;
    const jobs = createPeriodicJobs({
      log,
      leadership: { current: () => (leads ? { token: 1, signal: new AbortController().signal } : undefined) },
      jobs: [
        {
          name: "slow",
          cron: "* * * * * *",
          async run() {
            running += 1;
            most = Math.max(most, running);
            runs += 1;
            await delay(50);
            running -= 1;
            throw new Error("always");
          },
        },
      ],
    });
    await Promise.all([jobs.runNow("slow"), jobs.runNow("slow")]);
    expect([runs, most]).toEqual([1, 1]);
    jobs.start();
    await delay(1100);
    expect(runs).toBe(1);
    leads = true;
    await eventually(() => runs >= 3, "two runs by the clock");
    await jobs.stop();
  });
});
