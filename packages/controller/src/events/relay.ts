import { setTimeout as delay } from "node:timers/promises";
import { fullJitterMs } from "@palebluedot/shared/backoff.ts";
import { errorMessage } from "@palebluedot/shared/errors.ts";
import type { Logger } from "@palebluedot/shared/logger.ts";
import type { Sql } from "postgres";
import type { Notifications } from "../db/notifications.ts";
import type { Failpoints } from "../reconciler/failpoints.ts";
import { sequenceOutbox, sequencerBatchSize } from "./sequencer.ts";

export interface RelayOptions {
  readonly sql: Sql;
  readonly log: Logger;
  readonly notifications: Notifications;
  readonly failpoints: Failpoints;
  readonly isLeader: () => boolean;
  /** Called after each committed batch, in this process, before other replicas are told. */
  readonly onSequenced: (moved: number, lastSeq: number) => void;
  /** How long an event waits at most when no hint came. */
  readonly pollMs?: number;
}

export interface Relay {
  poke(): void;
  stop(): Promise<void>;
}

const backoff = { baseMs: 100, capMs: 5000 };
const gatherMs = 10;

/** Keeps moving the outbox into the stream while this replica leads; waits out a database that is away. */
export function startRelay(options: RelayOptions): Relay {
  const { sql, log, notifications, failpoints, isLeader, onSequenced } = options;
  const pollMs = options.pollMs ?? 200;
  const stopping = new AbortController();
  let wake: (() => void) | undefined;
  let poked = false;

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

  async function run(): Promise<void> {
    let failures = 0;
    while (!stopping.signal.aborted) {
      if (!isLeader()) {
        await idle();
        continue;
      }
      try {
        const { moved, lastSeq } = await sequenceOutbox(sql);
        if (failures > 0) log.info("events flow again");
        failures = 0;
        if (moved > 0) {
          failpoints.hit("events-sequenced");
          onSequenced(moved, lastSeq);
          // A hint: other replicas poll as well.
          notifications.notify("events", String(lastSeq)).catch((error: unknown) => {
            log.debug({ error: errorMessage(error) }, "replicas were not told of new events");
          });
        }
        // Under load the next ones gather for a moment: every batch costs a commit.
        if (moved > 0 && moved < sequencerBatchSize) await delay(gatherMs, undefined, { ref: false });
        if (moved < sequencerBatchSize) await idle();
      } catch (error) {
        if (failures === 0) {
          log.warn({ error: errorMessage(error) }, "events stay in the outbox; trying again");
        }
        failures += 1;
        await delay(fullJitterMs(failures, backoff), undefined, {
          signal: stopping.signal,
          ref: false,
        }).catch(() => undefined);
      }
    }
  }

  function poke(): void {
    poked = true;
    wake?.();
  }

  const unlisten = notifications.listen("outbox", poke, poke);
  const running = run();
  return {
    poke,
    async stop() {
      unlisten();
      stopping.abort();
      wake?.();
      await running;
    },
  };
}
