import { spawn, type ChildProcess } from "node:child_process";
import { once } from "node:events";
import { setTimeout as delay } from "node:timers/promises";
import { fileURLToPath } from "node:url";
import { createLogger } from "@palebluedot/shared/logger.ts";
import { connect, nanos, type JetStreamManager } from "nats";
import type { Sql } from "postgres";
import { afterEach, beforeEach, describe, expect, test } from "vitest";
import { natsServerBinary, startNatsServer, type NatsServer } from "../../../../test/support/nats.ts";
import { createTestDatabase, type TestDatabase } from "../db/testing.ts";
import { eventJsonSchema, listEvents, type EventJson } from "./event-row.ts";
import {
  eventSubject,
  natsBacklog,
  natsConnectionOptions,
  natsStreamName,
  startNatsSink,
} from "./nats-sink.ts";
import { appendEvents } from "./outbox.ts";
import { readHead, sequenceOutbox } from "./sequencer.ts";
import type { NewEvent } from "./types.ts";

const log = createLogger({ name: "test", level: "silent" });

async function eventually(check: () => boolean | Promise<boolean>, what: string, ms = 40_000): Promise<void> {
  for (const deadline = performance.now() + ms; performance.now() < deadline; await delay(25)) {
    if (await check()) return;
  }
  throw new Error(`did not happen: ${what}`);
}

async function withManager<T>(url: string, run: (manager: JetStreamManager) => Promise<T>): Promise<T> {
  const connection = await connect({ servers: url, reconnect: false });
  try {
    return await run(await connection.jetstreamManager());
  } finally {
    await connection.close();
  }
}

async function killRelay(child: ChildProcess): Promise<void> {
  if (child.exitCode !== null || child.signalCode !== null) return;
  const exited = once(child, "exit");
  child.kill("SIGKILL");
  await exited;
}

function numbered(count: number): NewEvent[] {
  return Array.from({ length: count }, (_, number) => ({ type: "test.numbered", data: { number } }));
}

async function acknowledged(sql: Sql): Promise<number> {
  return (await readHead(sql)) - (await natsBacklog(sql));
}

interface Received {
  readonly subject: string;
  readonly id: string;
  readonly event: EventJson;
}

/** Everything in the stream, read by a consumer from its beginning. */
async function receiveAll(url: string): Promise<Received[]> {
  const connection = await connect({ servers: url, reconnect: false });
  try {
    const manager = await connection.jetstreamManager();
    const { messages } = (await manager.streams.info(natsStreamName)).state;
    const received: Received[] = [];
    if (messages === 0) return received;
    const consumer = await connection.jetstream().consumers.get(natsStreamName);
    const reading = await consumer.consume({ max_messages: 500 });
    for await (const message of reading) {
      received.push({
        subject: message.subject,
        id: message.headers?.get("Nats-Msg-Id") ?? "",
        event: eventJsonSchema.parse(message.json()),
      });
      if (received.length === messages) break;
    }
    return received;
  } finally {
    await connection.close();
  }
}

test.each([
  ["nats://h", { servers: ["h:4222"] }],
  ["h:1, tls://user:p%40ss@i:2", { servers: ["h:1", "i:2"], user: "user", pass: "p@ss", tls: {} }],
  ["nats://tok3n@h", { servers: ["h:4222"], token: "tok3n" }],
])("the address %s", (url, options) => {
  expect(natsConnectionOptions(url)).toEqual(options);
});

test("a type becomes a subject, whatever it holds", () => {
  expect(eventSubject("allocation.active")).toBe("palebluedot.events.allocation.active");
  expect(eventSubject("a b.>..*")).toBe("palebluedot.events.a_b._._");
});

describe.skipIf(natsServerBinary() === undefined)("NATS JetStream (needs nats-server)", () => {
  let nats: NatsServer;
  let database: TestDatabase;
  let children: ChildProcess[];

  beforeEach(async () => {
    [nats, database] = await Promise.all([startNatsServer(), createTestDatabase()]);
    children = [];
  });
  afterEach(async () => {
    for (const child of children) await killRelay(child);
    await nats.close();
    await database.close();
  });

  function startRelayProcess(failpoint?: string): ChildProcess {
    const child = spawn(process.execPath, [fileURLToPath(new URL("testing-relay.ts", import.meta.url))], {
      stdio: ["pipe", "inherit", "inherit"],
      env: {
        PATH: process.env["PATH"],
        DATABASE_URL: database.url,
        NATS_URL: nats.url,
        ...(failpoint === undefined ? {} : { PALEBLUEDOT_FAILPOINT: failpoint }),
      },
    });
    children.push(child);
    return child;
  }

  async function append(events: readonly NewEvent[]): Promise<void> {
    await appendEvents(database.sql, events);
    while ((await sequenceOutbox(database.sql)).moved > 0);
  }

  test("each event arrives once and in order, while NATS and the relay are killed again and again", async () => {
    let written = 0;
    const finished = new AbortController();
    const writers = Array.from({ length: 3 }, async (_, writer) => {
      while (!finished.signal.aborted) {
        await appendEvents(database.sql, [
          { type: "test.a", data: { writer } },
          { type: "test.b.c", data: { writer } },
        ]);
        written += 2;
        await delay(4);
      }
    });
    // Dies between giving the first numbers and publishing them.
    const dying = startRelayProcess("events-sequenced");
    await once(dying, "exit");
    expect(dying.signalCode).toBe("SIGKILL");

    let relay = startRelayProcess();
    for (let round = 0; round < 4; round += 1) {
      const before = await acknowledged(database.sql);
      await eventually(
        async () => (await acknowledged(database.sql)) > before + 50,
        `progress in round ${round}`,
      );
      await killRelay(relay);
      relay = startRelayProcess();
      if (round % 2 === 0) {
        await nats.kill();
        await delay(300);
        await nats.restart();
      }
    }
    // Two relays at once, as when a paused leader wakes up.
    const second = startRelayProcess();
    const before = await acknowledged(database.sql);
    await eventually(
      async () => (await acknowledged(database.sql)) > before + 50,
      "progress with two relays",
    );
    await killRelay(second);

    finished.abort();
    await Promise.all(writers);
    await eventually(async () => {
      const [outbox] = await database.sql<{ rows: number }[]>`select count(*)::int as rows from outbox`;
      return outbox?.rows === 0 && (await natsBacklog(database.sql)) === 0;
    }, "everything acknowledged");

    const received = await receiveAll(nats.url);
    const stored: string[] = [];
    for (let afterSeq = 0; ; afterSeq = stored.length) {
      const page = await listEvents(database.sql, { afterSeq, limit: 1000 });
      stored.push(...page.map((event) => event.id));
      if (page.length < 1000) break;
    }
    expect(stored).toHaveLength(written);
    expect(received.map((message) => message.event.seq)).toEqual(received.map((_, index) => index + 1));
    expect(received.map((message) => message.id)).toEqual(stored);
    expect(received.every((message) => message.id === message.event.id)).toBe(true);
    expect(new Set(received.map((message) => message.subject))).toEqual(
      new Set(["palebluedot.events.test.a", "palebluedot.events.test.b.c"]),
    );
  }, 120_000);

  test("an acknowledgement lost longer ago than the duplicate window is no second copy", async () => {
    await append(numbered(40));
    const first = startNatsSink({ url: nats.url, sql: database.sql, log, isLeader: () => true });
    await eventually(async () => (await natsBacklog(database.sql)) === 0, "published");
    await first.stop();
    // As if the relay had died before it could note the last 15, and the window had passed since.
    await withManager(nats.url, async (manager) => {
      await manager.streams.update(natsStreamName, { duplicate_window: nanos(100) });
    });
    await delay(300);
    await database.sql`update event_cursors set seq = 25 where name = 'nats'`;
    await append(numbered(5));
    const second = startNatsSink({ url: nats.url, sql: database.sql, log, isLeader: () => true });
    await eventually(async () => (await natsBacklog(database.sql)) === 0, "published again");
    await second.stop();
    expect((await receiveAll(nats.url)).map((message) => message.event.seq)).toEqual(
      Array.from({ length: 45 }, (_, index) => index + 1),
    );
  });

  test("while NATS is away nothing waits for it, and the status says so", async () => {
    const sink = startNatsSink({ url: nats.url, sql: database.sql, log, isLeader: () => true, pollMs: 50 });
    await append(numbered(3));
    await eventually(() => sink.status().acknowledgedSeq === 3, "published");
    await nats.kill();
    await append(numbered(700));
    await eventually(() => sink.status().lastError !== undefined, "noticed");
    expect(sink.status()).toMatchObject({
      state: expect.stringMatching(/waiting|connecting/),
      acknowledgedSeq: 3,
    });
    expect(await natsBacklog(database.sql)).toBe(700);
    await nats.restart();
    await eventually(() => sink.status().acknowledgedSeq === 703, "published after the restart");
    expect(sink.status()).toMatchObject({ state: "publishing", lastError: undefined, failures: 0 });
    await sink.stop();
    expect(await receiveAll(nats.url)).toHaveLength(703);
  });

  test("a message of somebody else in the stream breaks nothing", async () => {
    const sink = startNatsSink({ url: nats.url, sql: database.sql, log, isLeader: () => true, pollMs: 20 });
    await append(numbered(3));
    await eventually(() => sink.status().acknowledgedSeq === 3, "published");
    const connection = await connect({ servers: nats.url, reconnect: false });
    await connection.jetstream().publish("palebluedot.events.foreign", "{}");
    await connection.close();
    await append(numbered(3));
    sink.poke();
    await eventually(() => sink.status().acknowledgedSeq === 6, "published behind it");
    await sink.stop();
    const { messages } = await withManager(
      nats.url,
      async (manager) => (await manager.streams.info(natsStreamName)).state,
    );
    expect(messages).toBe(7);
  });

  test("limits that an operator changed stay", async () => {
    const first = startNatsSink({ url: nats.url, sql: database.sql, log, isLeader: () => true });
    await eventually(() => first.status().state === "publishing", "set up");
    await first.stop();
    const config = await withManager(nats.url, async (manager) => {
      await manager.streams.update(natsStreamName, { max_msgs: 1234 });
      const second = startNatsSink({ url: nats.url, sql: database.sql, log, isLeader: () => true });
      await eventually(() => second.status().state === "publishing", "started again");
      await second.stop();
      return (await manager.streams.info(natsStreamName)).config;
    });
    expect(config).toMatchObject({
      subjects: ["palebluedot.events.>"],
      storage: "file",
      max_msgs: 1234,
      duplicate_window: nanos(600_000),
    });
  });
});
