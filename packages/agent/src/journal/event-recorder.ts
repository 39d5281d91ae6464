import type { Clock } from "@palebluedot/shared/clock.ts";
import { errorMessage, isPlatformError } from "@palebluedot/shared/errors.ts";
import type { Logger } from "@palebluedot/shared/logger.ts";
import type { EventJournal, JournalEntry } from "./types.ts";

/** Puts events into the journal, and holds those the disk does not take until it does. */
export interface EventRecorder {
  record(entry: JournalEntry): void;
  /** Tries once more to write what is held, then gives up on it. Before the journal is closed. */
  stop(): Promise<void>;
}

export function createEventRecorder(options: {
  readonly journal: Pick<EventJournal, "append">;
  readonly clock: Clock;
  readonly log: Logger;
  /** Events held while the disk takes none; the oldest go when there are more. Default 1000. */
  readonly maxHeld?: number;
  /** Default 5 s. */
  readonly retryMs?: number;
}): EventRecorder {
  const { journal, clock, log } = options;
  const maxHeld = options.maxHeld ?? 1000;
  const held: JournalEntry[] = [];
  let dropped = 0;
  let retrying: Promise<void> | undefined;
  const stopping = new AbortController();
  const underWay = new Set<Promise<void>>();

  /** True: it is written, or never will be. */
  async function tryAppend(entry: JournalEntry): Promise<boolean> {
    try {
      await journal.append(entry);
      return true;
    } catch (error) {
      if (isPlatformError(error) && error.code === "journal-write-failed") return false;
      log.error({ err: errorMessage(error), type: entry.type }, "an event was lost");
      return true;
    }
  }

  function hold(entry: JournalEntry): void {
    held.push(entry);
    if (held.length <= maxHeld) return;
    held.shift();
    dropped += 1;
  }

  /** In order; false when the disk still takes nothing. */
  async function writeHeld(): Promise<boolean> {
    if (dropped > 0) {
      const told = dropped;
      const marker: JournalEntry = {
        type: "journal.events-dropped",
        timeUnixMs: clock.now(),
        message: `${told} events were dropped: the disk took none for too long`,
        data: { dropped_events: told },
      };
      if (!(await tryAppend(marker))) return false;
      dropped -= told;
    }
    for (let entry = held[0]; entry !== undefined; entry = held[0]) {
      if (!(await tryAppend(entry))) return false;
      // Unless it was dropped for a newer one meanwhile.
      if (held[0] === entry) held.shift();
    }
    return true;
  }

  async function retry(): Promise<void> {
    log.error("the event journal cannot be written; events are held in memory");
    do {
      try {
        await clock.sleep(options.retryMs ?? 5000, stopping.signal);
      } catch {
        return;
      }
    } while (!(await writeHeld()));
    log.info("the event journal can be written again");
  }

  async function take(entry: JournalEntry): Promise<void> {
    if (await tryAppend(entry)) return;
    hold(entry);
    retrying ??= retry().finally(() => {
      retrying = undefined;
    });
  }

  return {
    record(entry) {
      // Behind those that wait already.
      if (retrying !== undefined) {
        hold(entry);
        return;
      }
      const work: Promise<void> = take(entry).finally(() => underWay.delete(work));
      underWay.add(work);
    },
    async stop() {
      await Promise.all(underWay);
      stopping.abort(new Error("stopped"));
      await retrying;
      if (held.length > 0 && !(await writeHeld())) {
        log.error({ events: held.length }, "events were lost: the disk takes none");
      }
    },
  };
}
