/** Answers that go on: made from async iterables, with back-pressure, and ended by a signal or the client. */

const keepAliveMs = 15_000;

export interface StreamSource<T> {
  readonly items: AsyncIterable<T>;
  /** One item on the wire; undefined sends nothing. */
  readonly encode: (item: T) => Uint8Array | undefined;
  readonly contentType: string;
  /** Sent at once, so that the answer's head leaves before the first item. */
  readonly preamble?: string;
  /** Sent when nothing else was for a while, so that proxies keep the connection. */
  readonly keepAlive?: string;
  /** Last words when the source fails; absent: the connection is cut, which a reader notices. */
  readonly onError?: (error: unknown) => Uint8Array;
  /** Runs once, however the stream ends. */
  readonly onEnd: () => void;
}

export function streamResponse<T>(source: StreamSource<T>): Response {
  const iterator = source.items[Symbol.asyncIterator]();
  const encoder = new TextEncoder();
  let pending: Promise<IteratorResult<T>> | undefined;
  let ended = false;

  function end(): void {
    if (ended) return;
    ended = true;
    source.onEnd();
  }

  const body = new ReadableStream<Uint8Array>(
    {
      start(controller) {
        if (source.preamble !== undefined) controller.enqueue(encoder.encode(source.preamble));
      },
      async pull(controller) {
        // Pull must enqueue something or end; items that encode to nothing are passed over.
        for (;;) {
          pending ??= iterator.next();
          let next: IteratorResult<T> | "quiet";
          try {
            next = source.keepAlive === undefined ? await pending : await raceQuiet(pending, keepAliveMs);
          } catch (error) {
            end();
            if (source.onError === undefined) {
              controller.error(error);
            } else {
              controller.enqueue(source.onError(error));
              controller.close();
            }
            return;
          }
          if (next === "quiet") {
            controller.enqueue(encoder.encode(source.keepAlive));
            return;
          }
          pending = undefined;
          if (next.done === true) {
            end();
            controller.close();
            return;
          }
          const bytes = source.encode(next.value);
          if (bytes !== undefined && bytes.byteLength > 0) {
            controller.enqueue(bytes);
            return;
          }
        }
      },
      async cancel() {
        end();
        // A rejection of the item under way has nobody left to hear it.
        pending?.catch(() => undefined);
        await iterator.return?.();
      },
    },
    { highWaterMark: 1 },
  );
  return new Response(body, {
    headers: {
      "content-type": source.contentType,
      "cache-control": "no-store",
      // nginx would collect a stream until its buffer is full.
      "x-accel-buffering": "no",
    },
  });
}

async function raceQuiet<T>(pending: Promise<T>, ms: number): Promise<T | "quiet"> {
  let timer: NodeJS.Timeout | undefined;
  const quiet = new Promise<"quiet">((resolve) => {
    timer = setTimeout(resolve, ms, "quiet");
  });
  try {
    return await Promise.race([pending, quiet]);
  } finally {
    clearTimeout(timer);
  }
}
