import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { createTestDatabase, type TestDatabase } from "../db/testing.ts";
import { listEvents } from "./event-row.ts";
import { appendEvents, maxDataCharacters, maxMessageCharacters } from "./outbox.ts";
import { readHead, sequenceOutbox } from "./sequencer.ts";

let database: TestDatabase;
beforeAll(async () => {
  database = await createTestDatabase();
});
afterAll(async () => {
  await database.close();
});

async function drain(): Promise<void> {
  while ((await sequenceOutbox(database.sql)).moved > 0);
}

describe("appendEvents", () => {
  test("keeps every member, and gives defaults for the rest", async () => {
    const { sql } = database;
    const before = await readHead(sql);
    const id = "01890a5d-ac96-774b-bcce-b302099a8057";
    const server = "01890a5d-ac96-774b-bcce-000000000001";
    await appendEvents(sql, [
      {
        id,
        type: "gpu.xid",
        severity: "error",
        serverId: server,
        actor: `agent:${server}`,
        message: "Xid 79",
        data: { xid: 79, nested: { list: [1, null, "a"] } },
        occurredAt: new Date("2026-01-02T03:04:05.678Z"),
      },
      { type: "server.enrolled" },
    ]);
    await drain();
    const [first, second] = (await listEvents(sql, { afterSeq: before, limit: 10 })).toSorted((a, b) =>
      a.type.localeCompare(b.type),
    );
    expect(first).toMatchObject({
      id,
      type: "gpu.xid",
      severity: "error",
      serverId: server,
      tenantId: null,
      message: "Xid 79",
      data: { xid: 79, nested: { list: [1, null, "a"] } },
      occurredAt: new Date("2026-01-02T03:04:05.678Z"),
    });
    expect(second).toMatchObject({ severity: "info", actor: "system", message: "", data: {} });
  });

  test.each([
    ["NUL in the message", { message: "a\0b" }, { message: "a\uFFFDb" }],
    ["a lone surrogate", { message: "x\uD800" }, { message: "x\uFFFD" }],
    ["NUL in a value", { data: { a: ["\0"] } }, { data: { a: ["\uFFFD"] } }],
    ["NUL in a key", { data: { "k\0": 1 } }, { data: { "k\uFFFD": 1 } }],
    ["an escaped backslash before u0000", { data: { a: "\\u0000" } }, { data: { a: "\\u0000" } }],
    ["a long message", { message: "m".repeat(10_000) }, { message: "m".repeat(maxMessageCharacters) }],
    [
      "oversize data",
      { data: { a: "x".repeat(maxDataCharacters) } },
      { data: { truncated: true, characters: maxDataCharacters + 8 } },
    ],
  ])("%s never breaks the change it tells of", async (_name, given, stored) => {
    const { sql } = database;
    const before = await readHead(sql);
    await appendEvents(sql, [{ type: "test.text", ...given }]);
    await drain();
    expect(await listEvents(sql, { afterSeq: before, limit: 10 })).toMatchObject([stored]);
  });

  test("is part of the caller's transaction", async () => {
    const { sql } = database;
    const before = await readHead(sql);
    await expect(
      sql.begin(async (tx) => {
        await appendEvents(tx, [{ type: "test.rolled-back" }]);
        throw new Error("roll back");
      }),
    ).rejects.toThrow("roll back");
    await drain();
    expect(await listEvents(sql, { afterSeq: before, limit: 10 })).toEqual([]);
  });
});

describe("sequencing", () => {
  test("an event of a slow transaction is not passed by", async () => {
    const { sql } = database;
    await drain();
    const before = await readHead(sql);
    const begun = Promise.withResolvers<void>();
    const commit = Promise.withResolvers<void>();
    const slow = sql.begin(async (tx) => {
      await appendEvents(tx, [{ type: "test.slow" }]);
      begun.resolve();
      await commit.promise;
    });
    await begun.promise;
    // Has a later id and is committed earlier.
    await appendEvents(sql, [{ type: "test.fast" }]);
    await drain();
    commit.resolve();
    await slow;
    await drain();
    const events = await listEvents(sql, { afterSeq: before, limit: 10 });
    expect(events.map((event) => [event.seq, event.type])).toEqual([
      [before + 1, "test.fast"],
      [before + 2, "test.slow"],
    ]);
  });

  test("several writers and several sequencers: each event once, no gap", async () => {
    const { sql } = database;
    await drain();
    const before = await readHead(sql);
    const writers = 4;
    const batches = 30;
    const written = new AbortController();
    const sequencing = Array.from({ length: 3 }, async () => {
      while (!written.signal.aborted) await sequenceOutbox(sql, 7);
    });
    await Promise.all(
      Array.from({ length: writers }, async (_, writer) => {
        for (let batch = 0; batch < batches; batch += 1) {
          await appendEvents(sql, [
            { type: "test.many", data: { writer, batch, part: 0 } },
            { type: "test.many", data: { writer, batch, part: 1 } },
          ]);
        }
      }),
    );
    written.abort();
    await Promise.all(sequencing);
    await drain();
    const events = await listEvents(sql, { afterSeq: before, limit: 1000 });
    const total = writers * batches * 2;
    expect(events.map((event) => event.seq)).toEqual(Array.from({ length: total }, (_, i) => before + 1 + i));
    expect(new Set(events.map((event) => JSON.stringify(event.data))).size).toBe(total);
  });
});
