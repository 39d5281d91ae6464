import { errorMessage } from "@palebluedot/shared/errors.ts";
import type { Clock } from "@palebluedot/shared/clock.ts";
import { fullJitterMs } from "@palebluedot/shared/backoff.ts";
import type { Logger } from "@palebluedot/shared/logger.ts";
import type { DesiredState } from "@palebluedot/shared/generated/palebluedot/agent/v1/agent.ts";
import type { AllocationAgentPort } from "../allocations/types.ts";

/** Servers in one query. */
const maxBatch = 500;

/**
 * Loads desired documents for whoever waits, in batches: what is asked for while a load runs is one more
 * load, however often it was asked for. Read after the request, so a document is never older than its cause.
 */
export interface DesiredStates {
  /** For Welcome. Rejects with what the database said. */
  load(serverId: string): Promise<DesiredState>;
  /** For changes: `deliver` gets every document that could be read; a failed load is tried again. */
  changed(serverIds: Iterable<string>): void;
  stop(): void;
}

export function createDesiredStates(options: {
  readonly port: Pick<AllocationAgentPort, "loadDesiredStates">;
  readonly deliver: (serverId: string, desired: DesiredState) => void;
  readonly clock: Clock;
  readonly log: Logger;
}): DesiredStates {
  interface Waiter {
    readonly resolve: (desired: DesiredState) => void;
    readonly reject: (error: Error) => void;
  }
  const waiting = new Map<string, Waiter[]>();
  const dirty = new Set<string>();
  const abort = new AbortController();
  let running = false;

  function kick(): void {
    if (running || abort.signal.aborted) return;
    running = true;
    // One turn of the loop later, so that a burst of calls is one query.
    setImmediate(() => {
      void run();
    });
  }

  async function run(): Promise<void> {
    let failures = 0;
    while ((waiting.size > 0 || dirty.size > 0) && !abort.signal.aborted) {
      const ids: string[] = [];
      const waiters = new Map<string, Waiter[]>();
      const pushed: string[] = [];
      for (const [id, list] of waiting) {
        if (ids.length >= maxBatch) break;
        ids.push(id);
        waiters.set(id, list);
      }
      for (const id of ids) waiting.delete(id);
      for (const id of dirty) {
        if (ids.length >= maxBatch) break;
        if (!waiters.has(id)) ids.push(id);
        pushed.push(id);
      }
      for (const id of pushed) dirty.delete(id);
      try {
        const documents = await options.port.loadDesiredStates(ids);
        failures = 0;
        for (const id of ids) {
          const document = documents.get(id);
          if (document === undefined) {
            for (const waiter of waiters.get(id) ?? []) waiter.reject(new Error("the server is gone"));
            continue;
          }
          for (const waiter of waiters.get(id) ?? []) waiter.resolve(document);
        }
        for (const id of pushed) {
          const document = documents.get(id);
          if (document !== undefined) options.deliver(id, document);
        }
      } catch (error) {
        failures += 1;
        options.log.error(
          { err: errorMessage(error), servers: ids.length },
          "desired states could not be loaded",
        );
        for (const list of waiters.values()) {
          for (const waiter of list) waiter.reject(error instanceof Error ? error : new Error(String(error)));
        }
        for (const id of pushed) dirty.add(id);
        await options.clock
          .sleep(50 + fullJitterMs(failures, { baseMs: 100, capMs: 5000 }), abort.signal)
          .catch(() => undefined);
      }
    }
    running = false;
  }

  return {
    load(serverId) {
      return new Promise((resolve, reject) => {
        const list = waiting.get(serverId);
        if (list === undefined) waiting.set(serverId, [{ resolve, reject }]);
        else list.push({ resolve, reject });
        kick();
      });
    },
    changed(serverIds) {
      for (const id of serverIds) dirty.add(id);
      if (dirty.size > 0) kick();
    },
    stop() {
      abort.abort(new Error("stopped"));
      for (const list of waiting.values()) {
        for (const waiter of list) waiter.reject(new Error("stopped"));
      }
      waiting.clear();
    },
  };
}
