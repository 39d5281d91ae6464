import { systemClock } from "@palebluedot/shared/clock.ts";
import { PlatformError } from "@palebluedot/shared/errors.ts";
import { createLogger } from "@palebluedot/shared/logger.ts";
import { expect, test } from "vitest";
import { createEventRecorder } from "./event-recorder.ts";
import type { JournalEntry } from "./types.ts";

const log = createLogger({ name: "test", level: "silent" });
const entry = (n: number): JournalEntry => ({ type: "t", timeUnixMs: n, message: `number ${n}` });

/** A journal whose disk can be full. */
function diskJournal() {
  const journal = {
    full: false,
    written: [] as string[],
    append(one: JournalEntry): Promise<number> {
      if (journal.full) {
        return Promise.reject(
          new PlatformError({ code: "journal-write-failed", kind: "unavailable", message: "disk full" }),
        );
      }
      return Promise.resolve(journal.written.push(one.message));
    },
  };
  return journal;
}

async function until(check: () => boolean): Promise<void> {
  for (const end = Date.now() + 5000; !check();) {
    if (Date.now() > end) throw new Error("not in time");
    await new Promise((resolve) => setTimeout(resolve, 5));
  }
}

test("events the disk does not take are held, and written in order when it does", async () => {
  const journal = diskJournal();
  const recorder = createEventRecorder({ journal, clock: systemClock, log, retryMs: 10 });
  recorder.record(entry(1));
  await until(() => journal.written.length === 1);
  journal.full = true;
  for (let n = 2; n <= 5; n += 1) recorder.record(entry(n));
  await new Promise((resolve) => setImmediate(resolve));
  recorder.record(entry(6));
  journal.full = false;
  await until(() => journal.written.length === 6);
  recorder.record(entry(7));
  await recorder.stop();
  expect(journal.written).toEqual([1, 2, 3, 4, 5, 6, 7].map((n) => `number ${n}`));
});

test("what is held is bounded, and the loss is an event", async () => {
  const journal = diskJournal();
  journal.full = true;
  const recorder = createEventRecorder({ journal, clock: systemClock, log, retryMs: 60_000, maxHeld: 3 });
  for (let n = 1; n <= 10; n += 1) recorder.record(entry(n));
  await new Promise((resolve) => setImmediate(resolve));
  journal.full = false;
  await recorder.stop();
  expect(journal.written).toEqual([
    "7 events were dropped: the disk took none for too long",
    "number 8",
    "number 9",
    "number 10",
  ]);
});
