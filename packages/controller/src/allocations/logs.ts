import type { Allocation } from "@palebluedot/shared/allocation-request.ts";
import { isPlatformError, PlatformError } from "@palebluedot/shared/errors.ts";
import { type LogChunk, LogChunk_Stream } from "@palebluedot/shared/generated/palebluedot/agent/v1/agent.ts";
import type { HttpContext } from "../http/context.ts";
import { asPlatformError } from "../http/problem.ts";
import { streamResponse } from "../http/streams.ts";

export interface LogRequest {
  readonly allocation: Pick<Allocation, "id" | "state" | "server_id">;
  /** What was kept of the output, for when the container is gone. */
  readonly outputTail: () => Promise<Buffer | undefined>;
  readonly follow: boolean;
  /** 0: from the start */
  readonly tailLines: number;
  /** 0: no bound */
  readonly sinceUnixMs: number;
  readonly timestamps: boolean;
  readonly asJson: boolean;
  readonly tokenId: string;
  readonly signal: AbortSignal;
}

/** A refusal comes within this time and is a problem document; later the answer has begun. */
const refusalMs = 250;

function noLogs(message: string, hint: string): PlatformError {
  return new PlatformError({ code: "logs-not-available", kind: "conflict", message, hint });
}

/** The container's output as it arrives from the agent. Throws `logs-not-available`, `agent-not-connected`. */
export async function logResponse(
  context: Pick<HttpContext, "sessions" | "identity">,
  request: LogRequest,
): Promise<Response> {
  const { allocation } = request;
  if (allocation.state === "ended") {
    const kept = await request.outputTail();
    if (kept !== undefined) return keptResponse(request, kept);
    throw noLogs(
      "the allocation has ended, its container was deleted with it, and no output was kept",
      "Read logs while it is active, or send them elsewhere from inside the container.",
    );
  }
  if (allocation.server_id === null) {
    throw noLogs("the allocation is on no server yet", "Wait until its state is active.");
  }
  const watch = context.identity.watch(request.tokenId);
  const clientGone = new AbortController();
  const end = (): void => {
    watch.end();
    clientGone.abort();
  };
  let iterator: AsyncIterator<LogChunk>;
  let first: Promise<IteratorResult<LogChunk>>;
  try {
    const chunks = context.sessions.openLogs(
      allocation.server_id,
      {
        allocationId: allocation.id,
        follow: request.follow,
        tailLines: request.tailLines,
        sinceUnixMs: request.sinceUnixMs,
        timestamps: request.timestamps,
      },
      AbortSignal.any([request.signal, watch.signal, clientGone.signal]),
    );
    iterator = chunks[Symbol.asyncIterator]();
    first = iterator.next();
    await settledWithin(first, refusalMs);
  } catch (error) {
    end();
    const gone = isPlatformError(error) && ["workload-not-found", "agent-not-connected"].includes(error.code);
    const kept = gone ? await request.outputTail() : undefined;
    if (kept !== undefined) return keptResponse(request, kept);
    throw error;
  }
  return streamResponse<LogChunk>({
    items: resumed(first, iterator),
    encode: request.asJson ? jsonEncoder() : (chunk) => chunk.data,
    contentType: request.asJson ? "application/x-ndjson" : "text/plain; charset=utf-8",
    ...(request.asJson
      ? {
          onError: (error: unknown) => {
            const { code, message } = asPlatformError(error);
            return Buffer.from(`${JSON.stringify({ error: { code, detail: message } })}\n`);
          },
        }
      : {}),
    onEnd: end,
  });
}

/** The container is gone: what was kept of its output, marked as such. Times were not kept with it. */
function keptResponse(request: LogRequest, kept: Buffer): Response {
  const output = lastLines(kept, request.tailLines);
  const body = request.asJson
    ? `${JSON.stringify({ stream: "merged", data: output.toString("utf8") })}\n`
    : new Uint8Array(output);
  return new Response(body, {
    headers: {
      "content-type": request.asJson ? "application/x-ndjson" : "text/plain; charset=utf-8",
      "cache-control": "no-store",
      [outputKeptHeader]: "end",
    },
  });
}

/** Says that the answer is not all of the output but what was kept of its end. */
const outputKeptHeader = "palebluedot-output";

function lastLines(output: Buffer, lines: number): Buffer {
  if (lines === 0) return output;
  let start = output.length;
  // A line break at the very end ends the last line; it does not begin another.
  if (output.at(-1) === 10) start -= 1;
  for (let found = 0; found < lines; found += 1) {
    start = start <= 0 ? -1 : output.lastIndexOf(10, start - 1);
    if (start === -1) return output;
  }
  return output.subarray(start + 1);
}

async function settledWithin(promise: Promise<unknown>, ms: number): Promise<void> {
  let timer: NodeJS.Timeout | undefined;
  const late = new Promise<void>((resolve) => {
    timer = setTimeout(resolve, ms);
  });
  try {
    await Promise.race([promise, late]);
  } finally {
    clearTimeout(timer);
  }
}

async function* resumed<T>(first: Promise<IteratorResult<T>>, rest: AsyncIterator<T>): AsyncIterable<T> {
  try {
    for (let next = await first; next.done !== true; next = await rest.next()) yield next.value;
  } finally {
    await rest.return?.();
  }
}

/** One decoder a stream: a character may be cut between two chunks. */
function jsonEncoder(): (chunk: LogChunk) => Uint8Array | undefined {
  const decoders = { stdout: new TextDecoder(), stderr: new TextDecoder() };
  return (chunk) => {
    const stream = chunk.stream === LogChunk_Stream.STDERR ? "stderr" : "stdout";
    const data = decoders[stream].decode(chunk.data, { stream: true });
    return data === "" ? undefined : Buffer.from(`${JSON.stringify({ stream, data })}\n`);
  };
}
