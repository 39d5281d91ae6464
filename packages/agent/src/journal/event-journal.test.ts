import { spawn } from "node:child_process";
import { once } from "node:events";
import { appendFile, mkdir, mkdtemp, readFile, rm, rmdir, stat, truncate, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { createLogger } from "@palebluedot/shared/logger.ts";
import { afterEach, beforeEach, describe, expect, test } from "vitest";
import { createEventJournal } from "./event-journal.ts";
import type { JournalEntry } from "./types.ts";

const log = createLogger({ name: "test", level: "silent" });
const entry = (n: number, extra: Partial<JournalEntry> = {}): JournalEntry => ({
  type: "container.exited",
  timeUnixMs: 1_000 + n,
  message: `number ${n}`,
  ...extra,
});

describe("event journal", () => {
  let dir: string;
  beforeEach(async () => {
    dir = await mkdtemp(join(tmpdir(), "pbd-journal-"));
  });
  afterEach(() => rm(dir, { recursive: true, force: true }));

  test("numbers events, hands them out in order and forgets what was acknowledged, across a restart", async () => {
    const first = await createEventJournal({ dir, log });
    const sequences = await Promise.all([1, 2, 3, 4, 5].map((n) => first.append(entry(n))));
    expect(sequences).toEqual([1, 2, 3, 4, 5]);
    expect(first.pending(2, 2).map((event) => event.message)).toEqual(["number 3", "number 4"]);
    await first.ackUpTo(3);
    await first.close();

    const second = await createEventJournal({ dir, log });
    expect(second.journalId).toBe(first.journalId);
    expect(second.pending(0, 100).map((event) => event.sequence)).toEqual([4, 5]);
    await second.ackUpTo(5);
    await second.close();
    const third = await createEventJournal({ dir, log });
    expect(third.pending(0, 100)).toEqual([]);
    expect(await third.append(entry(6))).toBe(6);
    await third.close();
  });

  test("a torn last line is dropped and its sequence used again", async () => {
    const first = await createEventJournal({ dir, log });
    await first.append(entry(1));
    await first.append(entry(2));
    await first.close();
    const path = join(dir, "events.jsonl");
    await truncate(path, (await stat(path)).size - 7);
    const second = await createEventJournal({ dir, log });
    expect(second.pending(0, 10).map((event) => event.message)).toEqual(["number 1"]);
    expect(await second.append(entry(3))).toBe(2);
    await second.close();
  });

  test("a journal that cannot be compacted at the start goes on as it is", async () => {
    const first = await createEventJournal({ dir, log });
    await first.append(entry(1));
    await first.append(entry(2));
    await first.close();
    const path = join(dir, "events.jsonl");
    await truncate(path, (await stat(path)).size - 7);
    // What makes room for the fresh file fails as on a full disk: there is a directory in its place.
    await mkdir(`${path}.new`);
    const second = await createEventJournal({ dir, log });
    expect(second.journalId).toBe(first.journalId);
    expect(await second.append(entry(3))).toBe(2);
    await second.close();
    await rmdir(`${path}.new`);
    const third = await createEventJournal({ dir, log });
    expect(third.pending(0, 10).map((event) => event.message)).toEqual(["number 1", "number 3"]);
    await third.close();
  });

  test("an acknowledgement beyond what was written takes nothing from later events", async () => {
    const first = await createEventJournal({ dir, log });
    await first.append(entry(1));
    await first.ackUpTo(1_000_000);
    expect(first.pending(0, 10)).toEqual([]);
    await first.append(entry(2));
    await first.append(entry(3));
    expect(first.pending(0, 10).map((event) => event.message)).toEqual(["number 2", "number 3"]);
    await first.close();
    const second = await createEventJournal({ dir, log });
    expect(second.pending(0, 10).map((event) => event.message)).toEqual(["number 2", "number 3"]);
    await second.close();
  });

  test("an acknowledgement that overtakes events being written spares them", async () => {
    const journal = await createEventJournal({ dir, log });
    await journal.append(entry(1));
    const appended = journal.append(entry(2));
    const later = journal.append(entry(3));
    await journal.ackUpTo(3);
    await Promise.all([appended, later]);
    await journal.close();
    const again = await createEventJournal({ dir, log });
    expect(again.pending(0, 10).map((event) => event.message)).toEqual(["number 2", "number 3"]);
    await again.close();
  });

  test("a line with a flipped bit is dropped, the ones after it stay", async () => {
    const first = await createEventJournal({ dir, log });
    for (const n of [1, 2, 3]) await first.append(entry(n));
    await first.close();
    const path = join(dir, "events.jsonl");
    await writeFile(path, (await readFile(path, "utf8")).replace("number 2", "number 9"));
    await appendFile(path, "garbage without a checksum\n");
    const second = await createEventJournal({ dir, log });
    expect(second.pending(0, 10).map((event) => event.message)).toEqual(["number 1", "number 3"]);
    expect(second.lastSequence()).toBe(3);
    await second.close();
  });

  test("when full the oldest go and one overflow event counts them all", async () => {
    const journal = await createEventJournal({ dir, log, maxEvents: 50 });
    for (let n = 1; n <= 200; n += 1) await journal.append(entry(n));
    const check = (events: ReturnType<typeof journal.pending>): void => {
      expect(events.length).toBeLessThanOrEqual(51);
      expect(events[0]?.type).toBe("journal.overflow");
      const dropped = JSON.parse(events[0]?.dataJson ?? "{}") as Record<string, number>;
      expect((dropped["dropped_events"] ?? 0) + events.length - 1).toBe(200);
      expect(dropped["first_dropped_unix_ms"]).toBe(1_001);
      expect(events.at(-1)?.message).toBe("number 200");
      expect(events[0]?.sequence).toBe((events[1]?.sequence ?? 0) - 1);
    };
    check(journal.pending(0, 1000));
    await journal.close();
    const again = await createEventJournal({ dir, log, maxEvents: 50 });
    check(again.pending(0, 1000));
    await again.close();
  });

  test("bytes are bounded too, and oversize data is replaced", async () => {
    const journal = await createEventJournal({ dir, log, maxBytes: 64 * 1024 });
    await journal.append(entry(0, { data: { text: "x".repeat(20_000) } }));
    expect(journal.pending(0, 1)[0]?.dataJson).toBe('{"truncated":true}');
    for (let n = 1; n < 40; n += 1) await journal.append(entry(n, { data: { text: "y".repeat(10_000) } }));
    const kept = journal.pending(0, 1000);
    expect(kept.length).toBeGreaterThan(2);
    expect(kept.reduce((sum, event) => sum + event.dataJson.length, 0)).toBeLessThanOrEqual(64 * 1024);
    expect((await stat(join(dir, "events.jsonl"))).size).toBeLessThan(256 * 1024);
    await journal.close();
  });

  test("acknowledged history is compacted away", async () => {
    const journal = await createEventJournal({ dir, log });
    for (let round = 0; round < 20; round += 1) {
      await Promise.all(
        Array.from({ length: 100 }, (_, n) => journal.append(entry(n, { data: { text: "z".repeat(200) } }))),
      );
      await journal.ackUpTo(journal.lastSequence());
    }
    expect(journal.lastSequence()).toBe(2000);
    expect((await stat(join(dir, "events.jsonl"))).size).toBeLessThan(256 * 1024);
    await journal.close();
  });

  test("what append promised survives kill -9", async () => {
    // The child prints each sequence after append resolved, as fast as it can, until it is killed.
    const module = fileURLToPath(new URL("./event-journal.ts", import.meta.url));
    const logger = fileURLToPath(new URL("../../../shared/src/logger.ts", import.meta.url));
    const child = spawn(process.execPath, [
      "--input-type=module",
      "-e",
      `const { createEventJournal } = await import(${JSON.stringify(module)});
       const { createLogger } = await import(${JSON.stringify(logger)});
       const journal = await createEventJournal({ dir: ${JSON.stringify(dir)}, log: createLogger({ name: "c", level: "silent" }) });
       for (;;) {
         const sequences = await Promise.all([1, 2, 3].map((n) => journal.append({ type: "t", timeUnixMs: n, message: "m" })));
         process.stdout.write(sequences.join("\\n") + "\\n");
       }`,
    ]);
    let output = "";
    let errors = "";
    child.stderr.on("data", (chunk: Buffer) => (errors += chunk.toString()));
    child.stdout.on("data", (chunk: Buffer) => {
      output += chunk.toString();
      if (output.split("\n").length > 60) child.kill("SIGKILL");
    });
    await once(child, "close");
    expect(errors).toBe("");
    const promised = Number(output.slice(0, output.lastIndexOf("\n")).split("\n").at(-1));
    expect(promised).toBeGreaterThan(50);
    const journal = await createEventJournal({ dir, log });
    const events = journal.pending(0, 100_000);
    expect(events.length).toBeGreaterThanOrEqual(promised);
    expect(events.map((event) => event.sequence)).toEqual(events.map((_, index) => index + 1));
    await journal.close();
  });
});
