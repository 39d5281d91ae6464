import { setTimeout as delay } from "node:timers/promises";
import { fullJitterMs } from "@palebluedot/shared/backoff.ts";
import { errorMessage, PlatformError } from "@palebluedot/shared/errors.ts";
import type { Logger } from "@palebluedot/shared/logger.ts";
import {
  connect,
  DiscardPolicy,
  headers,
  NatsError,
  nanos,
  RetentionPolicy,
  StorageType,
  type ConnectionOptions,
  type JetStreamClient,
  type JetStreamManager,
  type NatsConnection,
} from "nats";
import type { Sql } from "postgres";
import { eventToJson, listEvents, type EventRow } from "./event-row.ts";
import { readHead } from "./sequencer.ts";

export const natsStreamName = "PALEBLUEDOT_EVENTS";
export const natsSubjectPrefix = "palebluedot.events";
/** Carries the event's `seq`, so that a relay that starts again can tell how far the stream really is. */
export const natsSeqHeader = "Palebluedot-Event-Seq";

/** The `name` of the sink's row in event_cursors. */
export const natsCursorName = "nats";

const connectTimeoutMs = 5000;
const acknowledgeTimeoutMs = 5000;
const requestTimeoutMs = 5000;
/** Publishes that wait for their acknowledgement; also the page read from the database. */
const maxInFlight = 256;
const backoff = { baseMs: 250, capMs: 15_000 };
const streamMaxAgeMs = 7 * 24 * 3600 * 1000;
const streamMaxBytes = 1024 ** 3;
const duplicateWindowMs = 10 * 60 * 1000;
/** Bytes of a payload that leave room for headers under the server's limit. */
const headerAllowanceBytes = 1024;

export interface NatsSinkStatus {
  readonly state: "connecting" | "publishing" | "waiting";
  /** Everything up to this `seq` is acknowledged. */
  readonly acknowledgedSeq: number;
  /** Why it waits; absent while it publishes. */
  readonly lastError: string | undefined;
  readonly failures: number;
}

export interface NatsSink {
  /** New events may be there. */
  poke(): void;
  status(): NatsSinkStatus;
  stop(): Promise<void>;
}

export interface NatsSinkOptions {
  /** nats://[user:password@|token@]host:port, comma separated; tls:// asks for TLS. */
  readonly url: string;
  readonly sql: Sql;
  readonly log: Logger;
  /** Publishes only while this replica leads. */
  readonly isLeader: () => boolean;
  readonly onPublished?: (count: number) => void;
  readonly pollMs?: number;
  readonly random?: () => number;
}

/** Addresses and credentials of NATS_URL. Throws PlatformError `nats-url-invalid`, without quoting credentials. */
export function natsConnectionOptions(url: string): ConnectionOptions {
  const servers: string[] = [];
  let credentials: Pick<ConnectionOptions, "user" | "pass" | "token"> = {};
  let tls = false;
  for (const part of url.split(",").map((piece) => piece.trim())) {
    if (part === "") continue;
    const text = part.includes("://") ? part : `nats://${part}`;
    const parsed = URL.parse(text);
    if (parsed === null || !["nats:", "tls:"].includes(parsed.protocol) || parsed.hostname === "") {
      throw new PlatformError({
        code: "nats-url-invalid",
        kind: "invalid",
        message: "NATS_URL is not a list of nats:// or tls:// addresses",
        hint: "For example NATS_URL=nats://user:password@nats-1:4222,nats://nats-2:4222",
      });
    }
    if (parsed.protocol === "tls:") tls = true;
    if (parsed.username !== "") {
      const user = decodeURIComponent(parsed.username);
      credentials =
        parsed.password === "" ? { token: user } : { user, pass: decodeURIComponent(parsed.password) };
    }
    servers.push(`${parsed.hostname}:${parsed.port === "" ? "4222" : parsed.port}`);
  }
  return { servers, ...credentials, ...(tls ? { tls: {} } : {}) };
}

/** The dotted type as subject tokens; anything a subject cannot hold becomes "_". */
export function eventSubject(type: string): string {
  const tokens = type
    .split(".")
    .map((token) => token.replaceAll(/[^a-zA-Z0-9_-]/g, "_"))
    .filter((token) => token !== "");
  return [natsSubjectPrefix, ...tokens].join(".");
}

function payloadOf(event: EventRow, maxBytes: number): Uint8Array {
  const encoder = new TextEncoder();
  const payload = encoder.encode(JSON.stringify(eventToJson(event)));
  if (payload.length <= maxBytes) return payload;
  const shortened = { ...event, message: event.message.slice(0, 1024), data: { truncated: true } };
  return encoder.encode(JSON.stringify(eventToJson(shortened)));
}

async function ensureStream(manager: JetStreamManager): Promise<number> {
  try {
    const info = await manager.streams.info(natsStreamName);
    // An operator may have changed limits and replicas: they are the operator's from then on.
    return info.state.last_seq;
  } catch (error) {
    if (!(error instanceof NatsError) || error.api_error?.err_code !== 10_059) throw error;
  }
  const info = await manager.streams.add({
    name: natsStreamName,
    description: "Events of the Palebluedot controller",
    subjects: [`${natsSubjectPrefix}.>`],
    retention: RetentionPolicy.Limits,
    discard: DiscardPolicy.Old,
    storage: StorageType.File,
    max_age: nanos(streamMaxAgeMs),
    max_bytes: streamMaxBytes,
    duplicate_window: nanos(duplicateWindowMs),
  });
  return info.state.last_seq;
}

/**
 * How far the stream really is, by its last message; undefined when that tells nothing. It may be ahead of
 * the acknowledged cursor (a relay died between a publish and its acknowledgement) or behind it (the NATS
 * server lost what it had acknowledged but not yet written). Publishes are chained by what they expect before
 * them, so everything before the last one is stored too.
 */
async function storedSeq(
  manager: JetStreamManager,
  sql: Sql,
  streamSeq: number,
): Promise<number | undefined> {
  if (streamSeq === 0) return undefined;
  let message;
  try {
    message = await manager.streams.getMessage(natsStreamName, { seq: streamSeq });
  } catch (error) {
    // Aged out: nothing to learn.
    if (error instanceof NatsError && error.api_error?.err_code === 10_037) return undefined;
    throw error;
  }
  const seq = Number(message.header.get(natsSeqHeader));
  if (!Number.isSafeInteger(seq) || seq <= 0) return undefined;
  // The id proves that it is this database's history and not another installation's or a lost one.
  const [row] = await sql<{ id: string }[]>`select id from events where seq = ${seq}`;
  return row?.id === message.header.get("Nats-Msg-Id") ? seq : undefined;
}

async function readCursor(sql: Sql): Promise<number> {
  const [row] = await sql<{ seq: number }[]>`
    insert into event_cursors (name, seq) values (${natsCursorName}, 0)
    on conflict (name) do update set seq = event_cursors.seq
    returning seq`;
  return row?.seq ?? 0;
}

async function writeCursor(sql: Sql, seq: number): Promise<void> {
  await sql`update event_cursors set seq = ${seq} where name = ${natsCursorName} and seq <> ${seq}`;
}

/**
 * Publishes the stream to NATS JetStream, each event once and in order.
 *
 * Three guards: `Nats-Msg-Id` (JetStream drops what it saw within its window), the expected last sequence
 * and id of each publish (a lost or foreign message in between makes all later ones fail instead of leaving a gap,
 * also when two replicas publish at once), and a look at the stream's last message at every start (an event
 * stored whose acknowledgement was lost, also when NATS was away longer than the window).
 *
 * Every failure takes one path: close, back off with jitter, connect, read both cursors, go on. Nothing
 * else waits for NATS.
 */
export function startNatsSink(options: NatsSinkOptions): NatsSink {
  const { sql, log, isLeader } = options;
  const pollMs = options.pollMs ?? 1000;
  const connectionOptions = natsConnectionOptions(options.url);
  const stopping = new AbortController();
  let state: NatsSinkStatus["state"] = "connecting";
  let acknowledgedSeq = 0;
  let lastError: string | undefined;
  let failures = 0;
  let wake: (() => void) | undefined;
  let poked = false;

  /** Until a poke, the poll interval or the end. */
  async function idle(): Promise<void> {
    if (!poked && !stopping.signal.aborted) {
      await new Promise<void>((resolve) => {
        const timer = setTimeout(resolve, pollMs).unref();
        wake = () => {
          clearTimeout(timer);
          resolve();
        };
      });
      wake = undefined;
    }
    poked = false;
  }

  /** Publishes and advances the cursor over what is stored; returns the stream's last sequence then. */
  async function publishBatch(
    manager: JetStreamManager,
    jetstream: JetStreamClient,
    events: readonly EventRow[],
    streamSeq: number,
    maxPayloadBytes: number,
  ): Promise<number> {
    const acknowledgements = events.map(async (event, index) => {
      const carried = headers();
      carried.set(natsSeqHeader, String(event.seq));
      const previous = events[index - 1];
      const acknowledgement = await jetstream.publish(
        eventSubject(event.type),
        payloadOf(event, maxPayloadBytes),
        {
          msgID: event.id,
          headers: carried,
          timeout: acknowledgeTimeoutMs,
          expect: {
            streamName: natsStreamName,
            lastSequence: streamSeq + index,
            // A foreign message in between shifts the sequences, and a later event could take the place of
            // one that was refused: the id says who is really before it.
            ...(previous === undefined ? {} : { lastMsgID: previous.id }),
          },
        },
      );
      return acknowledgement.duplicate;
    });
    const settled = await Promise.allSettled(acknowledgements);
    const failed = settled.findIndex((result) => result.status === "rejected");
    const stored = failed === -1 ? events.length : failed;
    const duplicates = settled
      .slice(0, stored)
      .some((result) => result.status === "fulfilled" && result.value);
    const last = events[stored - 1];
    if (last !== undefined) {
      await writeCursor(sql, last.seq);
      acknowledgedSeq = last.seq;
      options.onPublished?.(stored);
    }
    // A duplicate was stored before and took no sequence now, so those behind it expected too much: not a
    // failure, only a reason to ask again where the stream ends.
    if (duplicates) return await ensureStream(manager);
    const failure = settled[failed];
    if (failure?.status === "rejected") throw failure.reason;
    return streamSeq + stored;
  }

  async function publishUntilFailure(connection: NatsConnection): Promise<void> {
    const manager = await connection.jetstreamManager({ timeout: requestTimeoutMs });
    const jetstream = connection.jetstream({ timeout: requestTimeoutMs });
    const maxPayloadBytes = (connection.info?.max_payload ?? 1024 * 1024) - headerAllowanceBytes;
    let streamSeq = await ensureStream(manager);
    let position = await readCursor(sql);
    const stored = await storedSeq(manager, sql, streamSeq);
    if (stored !== undefined && stored !== position) {
      log.info({ cursor: position, stored }, "the NATS stream's end is not where it was left; it counts");
      await writeCursor(sql, stored);
      position = stored;
    }
    acknowledgedSeq = position;
    state = "publishing";
    if (lastError !== undefined) log.info({ acknowledgedSeq }, "NATS takes events again");
    lastError = undefined;
    while (!stopping.signal.aborted && isLeader()) {
      const events = await listEvents(sql, { afterSeq: position, limit: maxInFlight });
      if (events.length === 0) {
        if (connection.isClosed()) throw new Error("the connection to NATS was closed");
        await idle();
        continue;
      }
      streamSeq = await publishBatch(manager, jetstream, events, streamSeq, maxPayloadBytes);
      position = acknowledgedSeq;
      failures = 0;
    }
  }

  async function run(): Promise<void> {
    while (!stopping.signal.aborted) {
      if (!isLeader()) {
        state = "waiting";
        await idle();
        continue;
      }
      let connection: NatsConnection | undefined;
      try {
        state = "connecting";
        // Reconnecting is this loop's: the library would send what it buffered, after we gave up on it.
        connection = await connect({
          ...connectionOptions,
          name: "palebluedot-controller",
          reconnect: false,
          timeout: connectTimeoutMs,
          pingInterval: 10_000,
          maxPingOut: 2,
        });
        // A connection that ends while idle is noticed at once, not at the next event.
        void connection.closed().then(() => wake?.());
        await publishUntilFailure(connection);
      } catch (error) {
        failures += 1;
        state = "waiting";
        const message = errorMessage(error);
        if (lastError === undefined) {
          log.warn({ error: message }, "NATS does not take events; they wait in the database");
        }
        lastError = message;
        await delay(fullJitterMs(failures, backoff, options.random), undefined, {
          signal: stopping.signal,
          ref: false,
        }).catch(() => undefined);
      } finally {
        await connection?.close().catch(() => undefined);
      }
    }
  }

  const running = run();

  return {
    poke() {
      poked = true;
      wake?.();
    },
    status: () => ({ state, acknowledgedSeq, lastError, failures }),
    async stop() {
      stopping.abort();
      wake?.();
      await running;
    },
  };
}

/** Events that NATS has not acknowledged. */
export async function natsBacklog(sql: Sql): Promise<number> {
  const [row] = await sql<{ seq: number }[]>`select seq from event_cursors where name = ${natsCursorName}`;
  return Math.max(0, (await readHead(sql)) - (row?.seq ?? 0));
}
