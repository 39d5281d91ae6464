import { randomUUID } from "node:crypto";
import { mkdir, open, rename, rm, type FileHandle } from "node:fs/promises";
import { join } from "node:path";
import { crc32 } from "node:zlib";
import { errorMessage, PlatformError } from "@palebluedot/shared/errors.ts";
import type { DurableEvent } from "@palebluedot/shared/generated/palebluedot/agent/v1/agent.ts";
import type { Logger } from "@palebluedot/shared/logger.ts";
import { z } from "zod";
import type { EventJournal, JournalEntry } from "./types.ts";

/**
 * File format, one record a line: crc32 of the JSON (8 hex digits), a space, the JSON. Records: header
 * (first line), event, ack, overflow. A line that is torn or does not match its checksum is dropped with
 * a warning; only the last one can be torn, because a batch is acknowledged to its callers after fsync.
 */
const eventSchema = z.object({
  sequence: z.int().positive(),
  timeUnixMs: z.int(),
  type: z.string(),
  gpuUuid: z.string(),
  allocationId: z.string(),
  message: z.string(),
  dataJson: z.string(),
});
const recordSchema = z.discriminatedUnion("record", [
  z.object({ record: z.literal("header"), journalId: z.string().min(1), lastSequence: z.int().min(0) }),
  z.object({ record: z.literal("event"), event: eventSchema }),
  z.object({ record: z.literal("ack"), sequence: z.int().min(0) }),
  z.object({ record: z.literal("overflow"), marker: eventSchema }),
]);
type JournalRecord = z.infer<typeof recordSchema>;

const maxDataBytes = 16 * 1024;
const maxMessageLength = 4096;
const overflowType = "journal.overflow";
const overflowDataSchema = z.object({
  dropped_events: z.int(),
  first_dropped_unix_ms: z.int(),
  last_dropped_unix_ms: z.int(),
});

export interface EventJournalOptions {
  /** Made with mode 0700 when it is absent. */
  readonly dir: string;
  readonly log: Logger;
  /** Unacknowledged events kept; the oldest tenth goes when there are more. Default 10,000. */
  readonly maxEvents?: number;
  /** Bytes of unacknowledged events kept, also the bound of memory. Default 8 MiB. */
  readonly maxBytes?: number;
}

function formatRecord(record: JournalRecord): string {
  const json = JSON.stringify(record);
  return `${crc32(json).toString(16).padStart(8, "0")} ${json}\n`;
}

function parseRecord(line: string): JournalRecord | undefined {
  const json = line.slice(9);
  if (line[8] !== " " || crc32(json) !== Number.parseInt(line.slice(0, 8), 16)) return undefined;
  try {
    return recordSchema.safeParse(JSON.parse(json)).data;
  } catch {
    return undefined;
  }
}

const sizeOf = (event: DurableEvent): number =>
  160 +
  Buffer.byteLength(event.message) +
  Buffer.byteLength(event.dataJson) +
  event.type.length +
  event.gpuUuid.length +
  event.allocationId.length;

function toEvent(entry: JournalEntry, sequence: number): DurableEvent {
  const json = JSON.stringify(entry.data ?? {});
  return {
    sequence,
    timeUnixMs: Math.trunc(entry.timeUnixMs),
    type: entry.type.slice(0, 128),
    gpuUuid: (entry.gpuUuid ?? "").slice(0, 128),
    allocationId: (entry.allocationId ?? "").slice(0, 128),
    // Lone surrogates would not survive the file and the wire unchanged.
    message: entry.message.slice(0, maxMessageLength).toWellFormed(),
    dataJson: Buffer.byteLength(json) > maxDataBytes ? '{"truncated":true}' : json,
  };
}

/** What is on disk and unacknowledged, in memory. Pure bookkeeping: the file is the journal's business. */
class PendingEvents {
  readonly events: DurableEvent[] = [];
  bytes = 0;

  push(event: DurableEvent): void {
    this.events.push(event);
    this.bytes += sizeOf(event);
  }

  /** Index of the first event after `sequence`; sequences grow but are not contiguous after an overflow. */
  indexAfter(sequence: number): number {
    let low = 0;
    let high = this.events.length;
    while (low < high) {
      const middle = (low + high) >>> 1;
      if ((this.events[middle]?.sequence ?? 0) > sequence) high = middle;
      else low = middle + 1;
    }
    return low;
  }

  dropUpTo(sequence: number): DurableEvent[] {
    const dropped = this.events.splice(0, this.indexAfter(sequence));
    for (const event of dropped) this.bytes -= sizeOf(event);
    return dropped;
  }

  overflow(marker: DurableEvent): void {
    this.dropUpTo(marker.sequence);
    this.events.unshift(marker);
    this.bytes += sizeOf(marker);
  }
}

function overflowMarker(dropped: readonly DurableEvent[]): DurableEvent | undefined {
  const last = dropped.at(-1);
  if (!last) return undefined;
  let count = 0;
  let firstUnixMs = Number.MAX_SAFE_INTEGER;
  for (const event of dropped) {
    const earlier =
      event.type === overflowType ? overflowDataSchema.safeParse(JSON.parse(event.dataJson)).data : undefined;
    count += earlier?.dropped_events ?? 1;
    firstUnixMs = Math.min(firstUnixMs, earlier?.first_dropped_unix_ms ?? event.timeUnixMs);
  }
  return toEvent(
    {
      type: overflowType,
      timeUnixMs: last.timeUnixMs,
      message: `${count} events were dropped: the journal was full while no controller acknowledged`,
      data: {
        dropped_events: count,
        first_dropped_unix_ms: firstUnixMs,
        last_dropped_unix_ms: last.timeUnixMs,
      },
    },
    last.sequence,
  );
}

interface Queued {
  readonly entry: JournalEntry;
  readonly resolve: (sequence: number) => void;
  readonly reject: (error: unknown) => void;
}

interface OpenedFile {
  readonly journalId: string;
  readonly pending: PendingEvents;
  lastSequence: number;
  handle: FileHandle;
  size: number;
}

async function syncDirectory(dir: string): Promise<void> {
  const handle = await open(dir, "r");
  try {
    await handle.sync();
  } finally {
    await handle.close();
  }
}

/** Writes a fresh file beside the old one and swaps it in: a crash leaves either the old or the new. */
async function rewrite(
  dir: string,
  path: string,
  state: { journalId: string; lastSequence: number; pending: PendingEvents },
): Promise<{ handle: FileHandle; size: number }> {
  const lines = [
    formatRecord({ record: "header", journalId: state.journalId, lastSequence: state.lastSequence }),
    ...state.pending.events.map((event) =>
      formatRecord(
        event.type === overflowType ? { record: "overflow", marker: event } : { record: "event", event },
      ),
    ),
  ];
  const body = Buffer.from(lines.join(""));
  const handle = await open(`${path}.new`, "w", 0o600);
  try {
    await handle.writeFile(body);
    await handle.sync();
    await rename(`${path}.new`, path);
    await syncDirectory(dir);
    return { handle, size: body.length };
  } catch (error) {
    await handle.close();
    // On a full disk what was written of it is room that others need.
    await rm(`${path}.new`, { force: true }).catch(() => undefined);
    throw error;
  }
}

async function load(dir: string, path: string, log: Logger): Promise<OpenedFile> {
  await mkdir(dir, { recursive: true, mode: 0o700 });
  const pending = new PendingEvents();
  let journalId: string | undefined;
  let lastSequence = 0;
  let damagedLines = 0;
  let text = "";
  try {
    const handle = await open(path, "r");
    try {
      text = await handle.readFile("utf8");
    } finally {
      await handle.close();
    }
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== "ENOENT") throw error;
  }
  for (const line of text.split("\n")) {
    if (line === "") continue;
    const record = parseRecord(line);
    switch (record?.record) {
      case undefined:
        damagedLines += 1;
        break;
      case "header":
        journalId = record.journalId;
        lastSequence = Math.max(lastSequence, record.lastSequence);
        break;
      case "event":
        if ((pending.events.at(-1)?.sequence ?? 0) >= record.event.sequence) break;
        pending.push(record.event);
        lastSequence = Math.max(lastSequence, record.event.sequence);
        break;
      case "ack":
        pending.dropUpTo(record.sequence);
        break;
      case "overflow":
        pending.overflow(record.marker);
        lastSequence = Math.max(lastSequence, record.marker.sequence);
        break;
    }
  }
  if (damagedLines > 0) log.warn({ path, damagedLines }, "event journal: damaged lines dropped");
  if (journalId === undefined) {
    if (text !== "") log.warn({ path }, "event journal: header lost, a new journal begins");
    // Sequences of a journal whose name is lost mean nothing: begin anew, keep the events.
    const kept = pending.events.splice(0);
    pending.bytes = 0;
    lastSequence = 0;
    for (const event of kept) pending.push({ ...event, sequence: (lastSequence += 1) });
  }
  const state = { journalId: journalId ?? randomUUID(), lastSequence, pending };
  try {
    return { ...state, ...(await rewrite(dir, path, state)) };
  } catch (error) {
    // A full disk must not keep the agent from starting: the old file goes on, without its torn last line.
    if (journalId === undefined) throw error;
    log.warn({ path, reason: errorMessage(error) }, "event journal could not be compacted");
    const size = Buffer.byteLength(text.slice(0, text.lastIndexOf("\n") + 1));
    return { ...state, handle: await open(path, "r+"), size };
  }
}

/** Opens (or makes) the journal in `options.dir`. Rejects when the directory cannot be read or written. */
export async function createEventJournal(options: EventJournalOptions): Promise<EventJournal> {
  const maxEvents = options.maxEvents ?? 10_000;
  const maxBytes = options.maxBytes ?? 8 * 1024 * 1024;
  const path = join(options.dir, "events.jsonl");
  const file = await load(options.dir, path, options.log);
  const listeners = new Set<() => void>();
  const queue: Queued[] = [];
  let ackSequence: number | undefined;
  let writing: Promise<void> | undefined;
  let closed = false;

  /** One batch: all queued events and the newest ack, one write, one fsync when there are events. */
  async function writeBatch(): Promise<void> {
    const batch = queue.splice(0, 1000);
    const ack = ackSequence;
    ackSequence = undefined;
    let sequence = file.lastSequence;
    const events = batch.map(({ entry }) => toEvent(entry, (sequence += 1)));
    try {
      const records: JournalRecord[] = events.map((event) => ({ record: "event", event }));
      if (ack !== undefined) records.push({ record: "ack", sequence: ack });
      const body = Buffer.from(records.map(formatRecord).join(""));
      await file.handle.write(body, 0, body.length, file.size);
      // A lost ack only means that something is sent again; it needs no fsync of its own.
      if (events.length > 0) await file.handle.sync();
      file.size += body.length;
    } catch (cause) {
      // What a failed write left behind must not precede the next batch's lines.
      await file.handle.truncate(file.size).catch(() => undefined);
      const error = new PlatformError({
        code: "journal-write-failed",
        kind: "unavailable",
        message: `the event journal could not be written: ${errorMessage(cause)}`,
        hint: "Is the disk of the agent's data directory full?",
        cause,
      });
      for (const { reject } of batch) reject(error);
      return;
    }
    if (ack !== undefined) file.pending.dropUpTo(ack);
    for (const event of events) file.pending.push(event);
    file.lastSequence = sequence;
    await bound();
    batch.forEach(({ resolve }, index) => resolve(events[index]?.sequence ?? 0));
    if (events.length > 0) for (const listener of listeners) listener();
  }

  /** Drops the oldest tenth when over a bound, and rewrites the file when most of it is history. */
  async function bound(): Promise<void> {
    const { pending } = file;
    if (pending.events.length > maxEvents || pending.bytes > maxBytes) {
      let keepFrom = pending.events.length - Math.floor(maxEvents * 0.9);
      let bytes = pending.bytes;
      for (let index = 0; index < pending.events.length; index += 1) {
        if (index >= keepFrom && bytes <= maxBytes * 0.9) {
          keepFrom = index;
          break;
        }
        const event = pending.events[index];
        if (event) bytes -= sizeOf(event);
        keepFrom = Math.max(keepFrom, index + 1);
      }
      const marker = overflowMarker(pending.events.slice(0, Math.max(1, keepFrom)));
      if (marker) {
        pending.overflow(marker);
        options.log.warn({ path }, "event journal is full: the oldest events were dropped");
      }
    } else if (file.size < 64 * 1024 || file.size < 2 * pending.bytes + 64 * 1024) {
      return;
    }
    try {
      const fresh = await rewrite(options.dir, path, file);
      await file.handle.close();
      file.handle = fresh.handle;
      file.size = fresh.size;
    } catch (error) {
      // The old file still holds everything; the next batch tries again.
      options.log.warn({ path, reason: errorMessage(error) }, "event journal could not be compacted");
    }
  }

  function pump(): Promise<void> {
    writing ??= (async () => {
      try {
        while (queue.length > 0 || ackSequence !== undefined) await writeBatch();
      } finally {
        writing = undefined;
      }
    })();
    return writing;
  }

  return {
    journalId: file.journalId,
    append(entry) {
      if (closed) {
        return Promise.reject(
          new PlatformError({ code: "journal-closed", kind: "internal", message: "the journal is closed" }),
        );
      }
      return new Promise((resolve, reject) => {
        queue.push({ entry, resolve, reject });
        void pump();
      });
    },
    async ackUpTo(sequence) {
      const first = file.pending.events[0];
      if (closed || !first || first.sequence > sequence) return;
      // Never beyond what was handed out: a controller cannot acknowledge what it has not seen.
      ackSequence = Math.max(ackSequence ?? 0, Math.min(sequence, file.lastSequence));
      await pump();
    },
    pending(afterSequence, limit) {
      const from = file.pending.indexAfter(afterSequence);
      return file.pending.events.slice(from, from + Math.max(0, limit));
    },
    lastSequence: () => file.lastSequence,
    onAppended(listener) {
      listeners.add(listener);
      return () => listeners.delete(listener);
    },
    async close() {
      closed = true;
      await pump();
      await file.handle.close();
    },
  };
}
