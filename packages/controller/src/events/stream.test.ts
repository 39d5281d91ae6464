import { setTimeout as delay } from "node:timers/promises";
import { createLogger } from "@palebluedot/shared/logger.ts";
import { Registry } from "prom-client";
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, test } from "vitest";
import { createNotifications, type Notifications } from "../db/notifications.ts";
import { createTestDatabase, type TestDatabase } from "../db/testing.ts";
import { createFailpoints } from "../reconciler/failpoints.ts";
import { listEvents, matchesFilter, type EventFilter, type EventRow } from "./event-row.ts";
import { createEventFeature, type EventFeature } from "./feature.ts";
import { appendEvents } from "./outbox.ts";
import { purgeEvents } from "./purge.ts";
import { readHead, sequenceOutbox } from "./sequencer.ts";
import { createEventStream } from "./stream.ts";
import type { NewEvent } from "./types.ts";

const log = createLogger({ name: "test", level: "silent" });
let database: TestDatabase;
let notifications: Notifications;

beforeAll(async () => {
  database = await createTestDatabase();
  notifications = createNotifications(database.sql);
});
afterAll(async () => {
  await notifications.close();
  await database.close();
});

async function append(events: readonly NewEvent[]): Promise<void> {
  await appendEvents(database.sql, events);
  while ((await sequenceOutbox(database.sql)).moved > 0);
}

function numbered(count: number, type = "test.numbered"): NewEvent[] {
  return Array.from({ length: count }, (_, number) => ({ type, data: { number } }));
}

/** Reads until `count` events came; fails after 20 s instead of hanging. */
async function take(
  events: AsyncIterable<EventRow>,
  count: number,
  onEvent: (event: EventRow) => Promise<void> | void = () => undefined,
): Promise<EventRow[]> {
  const taken: EventRow[] = [];
  const reading = (async () => {
    for await (const event of events) {
      taken.push(event);
      await onEvent(event);
      if (taken.length === count) return;
    }
  })();
  await Promise.race([
    reading,
    delay(20_000).then(() => {
      throw new Error(`only ${taken.length} of ${count} events came`);
    }),
  ]);
  return taken;
}

const range = (from: number, count: number): number[] => Array.from({ length: count }, (_, i) => from + i);

/** A ring smaller than the traffic, so that both ways of reading and the change between them are used. */
function makeStream(): ReturnType<typeof createEventStream> {
  return createEventStream({ sql: database.sql, log, notifications, ringEvents: 16, pollMs: 20 });
}

function makeFeature(natsUrl: string | undefined, metrics: Registry): EventFeature {
  return createEventFeature({
    sql: database.sql,
    log,
    failpoints: createFailpoints(undefined),
    notifications,
    metrics,
    config: { NATS_URL: natsUrl },
  });
}

describe("subscribe", () => {
  test("catches up, then follows, without gap or duplicate, at any speed of the reader", async () => {
    const stream = makeStream();
    const before = await readHead(database.sql);
    await append(numbered(700));
    const writing = (async () => {
      for (let round = 0; round < 40; round += 1) {
        await append(numbered(10));
        stream.poke();
      }
    })();
    const [fast, slow, short] = await Promise.all([
      take(stream.subscribe({ afterSeq: before }), 1100),
      take(stream.subscribe({ afterSeq: before + 600 }), 500, async (event) => {
        if (event.seq % 50 === 0) await delay(15);
      }),
      take(stream.subscribe({ afterSeq: before + 690 }), 20),
      writing,
    ]);
    expect(fast.map((event) => event.seq)).toEqual(range(before + 1, 1100));
    expect(slow.map((event) => event.seq)).toEqual(range(before + 601, 500));
    expect(short.map((event) => event.seq)).toEqual(range(before + 691, 20));
    expect(stream.subscribers()).toBe(0);
    await stream.close();
  });

  test("without a place to resume only new events come", async () => {
    const stream = makeStream();
    await append(numbered(5));
    const before = await readHead(database.sql);
    const abort = new AbortController();
    const iterator = stream.subscribe({ signal: abort.signal })[Symbol.asyncIterator]();
    const next = iterator.next();
    // The reader's place is taken when its first read of the stream is done.
    await expect.poll(() => stream.subscribers()).toBe(1);
    await delay(100);
    await append([{ type: "test.new" }]);
    expect(await next).toMatchObject({ value: { seq: before + 1, type: "test.new" } });
    const pending = iterator.next();
    abort.abort();
    expect(await pending).toEqual({ value: undefined, done: true });
    expect(stream.subscribers()).toBe(0);
    await stream.close();
  });

  test("a place beyond the end is the end", async () => {
    const stream = makeStream();
    const before = await readHead(database.sql);
    const reading = take(stream.subscribe({ afterSeq: before + 1_000_000 }), 1);
    await expect.poll(() => stream.subscribers()).toBe(1);
    await delay(100);
    await append([{ type: "test.after-restore" }]);
    expect((await reading)[0]?.seq).toBe(before + 1);
    await stream.close();
  });

  test("filters hold from the database and live", async () => {
    const stream = makeStream();
    const before = await readHead(database.sql);
    const tenant = "01890a5d-ac96-774b-bcce-0000000000aa";
    const mixed = (): NewEvent[] =>
      range(0, 50).map((number) => ({
        type: number % 2 === 0 ? "even.one" : "odd.one",
        tenantId: number % 10 === 0 ? tenant : null,
        data: { number },
      }));
    await append(mixed());
    const reading = take(
      stream.subscribe({ afterSeq: before, filter: { typePrefixes: ["even."], tenantId: tenant } }),
      10,
    );
    await append(mixed());
    const events = await reading;
    expect(events.map((event) => event.data["number"])).toEqual([0, 10, 20, 30, 40, 0, 10, 20, 30, 40]);
    await stream.close();
  });

  test("close ends the readers", async () => {
    const stream = makeStream();
    const iterator = stream.subscribe({})[Symbol.asyncIterator]();
    const pending = iterator.next();
    await expect.poll(() => stream.subscribers()).toBe(1);
    await stream.close();
    expect(await pending).toEqual({ value: undefined, done: true });
  });
});

describe("filter", () => {
  test("the database and the memory agree", async () => {
    const a = "01890a5d-ac96-774b-bcce-0000000000a1";
    const b = "01890a5d-ac96-774b-bcce-0000000000b2";
    const before = await readHead(database.sql);
    await append(
      ["x.one", "x.two", "xy.one", "x"].flatMap((type) =>
        [null, a, b].flatMap((id) =>
          (["info", "error"] as const).map((severity) => ({
            type,
            severity,
            tenantId: id,
            serverId: id,
            gpuId: id,
            allocationId: id,
          })),
        ),
      ),
    );
    const all = await listEvents(database.sql, { afterSeq: before, limit: 1000 });
    expect(all).toHaveLength(24);
    const filters: EventFilter[] = [
      {},
      { typePrefixes: [] },
      { typePrefixes: ["x."] },
      { typePrefixes: ["x.t", "xy"] },
      { typePrefixes: ["x", "x.", "zz"], severities: ["error"] },
      { typePrefixes: ["x."], tenantId: a, severities: ["info"] },
      { severities: ["error"] },
      { tenantId: a },
      { serverId: b, severities: ["info", "error"] },
      { gpuId: a, allocationId: a },
      { tenantId: a, serverId: b },
    ];
    for (const filter of filters) {
      const stored = await listEvents(database.sql, { afterSeq: before, limit: 1000, filter });
      expect(stored.map((event) => event.seq)).toEqual(
        all.filter((event) => matchesFilter(event, filter)).map((event) => event.seq),
      );
    }
    const lastOne = await listEvents(database.sql, {
      limit: 3,
      order: "descending",
      filter: { typePrefixes: ["x."] },
    });
    const expected = all.filter((event) => event.type.startsWith("x.")).map((event) => event.seq);
    expect(lastOne.map((event) => event.seq)).toEqual(expected.toReversed().slice(0, 3));
    const newest = await listEvents(database.sql, { beforeSeq: before + 25, limit: 2, order: "descending" });
    expect(newest.map((event) => event.seq)).toEqual([before + 24, before + 23]);
  });
});

describe("purge", () => {
  test("old events go, but never those that NATS has yet to take", async () => {
    const { sql } = database;
    await append(numbered(20));
    const head = await readHead(sql);
    const future = new Date(Date.now() + 60_000);
    await sql`insert into event_cursors (name, seq) values ('nats', ${head - 8}) on conflict (name) do update set seq = excluded.seq`;
    expect(await purgeEvents(sql, { olderThan: new Date(0), keepUnpublished: false })).toBe(0);
    await purgeEvents(sql, { olderThan: future, keepUnpublished: true });
    expect((await listEvents(sql, { limit: 100 })).map((event) => event.seq)).toEqual(range(head - 7, 8));
    expect(await purgeEvents(sql, { olderThan: future, keepUnpublished: false })).toBe(8);
    // The numbering goes on where it was.
    await append(numbered(1));
    expect((await listEvents(sql, { limit: 100 })).map((event) => event.seq)).toEqual([head + 1]);
  });
});

describe("event feature", () => {
  let feature: EventFeature;
  let metrics: Registry;
  beforeEach(() => {
    metrics = new Registry();
    feature = makeFeature(undefined, metrics);
    feature.start();
  });
  afterEach(async () => {
    await feature.stop();
  });

  test("without NATS, what is committed reaches a subscriber and the counters", async () => {
    const before = await readHead(database.sql);
    const reading = take(feature.subscribe({ afterSeq: before }), 3);
    await appendEvents(database.sql, numbered(3));
    feature.poke();
    expect((await reading).map((event) => event.seq)).toEqual(range(before + 1, 3));
    expect(await feature.status()).toEqual({ lastSeq: before + 3, outboxRows: 0, nats: undefined });
    expect(await metrics.metrics()).toContain("palebluedot_events_sequenced_total 3");
  });

  test("a faulty NATS_URL is refused at once, without its password", () => {
    const url = "http://user:hunter2@host";
    expect(() => makeFeature(url, metrics)).toThrow(expect.objectContaining({ code: "nats-url-invalid" }));
    expect(() => makeFeature(url, metrics)).not.toThrow(/hunter2/);
  });
});
