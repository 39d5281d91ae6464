/**
 * Group commit: while batches are under way, later calls gather into the next one. An idle caller does not
 * wait, a busy system writes many changes with one commit.
 */
export interface Batcher<Item, Result> {
  /** Resolves with what `run` returned for this item. */
  submit(item: Item): Promise<Result>;
  /** Resolves when nothing is under way. */
  idle(): Promise<void>;
}

interface Pending<Item, Result> {
  readonly item: Item;
  readonly settle: (result: Result) => void;
  readonly fail: (error: unknown) => void;
}

export function createBatcher<Item, Result>(options: {
  /** Results in the order of the items. A throw fails every item of the batch. */
  readonly run: (items: readonly Item[]) => Promise<readonly Result[]>;
  readonly maxBatch: number;
  readonly concurrency: number;
}): Batcher<Item, Result> {
  let pending: Pending<Item, Result>[] = [];
  const running = new Set<Promise<void>>();

  async function runBatch(batch: readonly Pending<Item, Result>[]): Promise<void> {
    try {
      const results = await options.run(batch.map((entry) => entry.item));
      for (const [index, entry] of batch.entries()) {
        if (index < results.length) entry.settle(results[index] as Result);
        else entry.fail(new Error("the batch returned too few results"));
      }
    } catch (error) {
      for (const entry of batch) entry.fail(error);
    }
  }

  function launch(): void {
    while (pending.length > 0 && running.size < options.concurrency) {
      const batch = pending.slice(0, options.maxBatch);
      pending = pending.slice(batch.length);
      const run = runBatch(batch).finally(() => {
        running.delete(run);
        launch();
      });
      running.add(run);
    }
  }

  return {
    submit(item) {
      return new Promise<Result>((settle, fail) => {
        pending.push({ item, settle, fail });
        // Calls of the same turn of the event loop go together.
        if (running.size < options.concurrency) queueMicrotask(launch);
      });
    },
    async idle() {
      while (running.size > 0 || pending.length > 0) {
        launch();
        await Promise.all(running);
      }
    },
  };
}
