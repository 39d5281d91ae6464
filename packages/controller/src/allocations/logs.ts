import type { Allocation } from "@palebluedot/shared/allocation-request.ts";
import { PlatformError } from "@palebluedot/shared/errors.ts";
import { type LogChunk, LogChunk_Stream } from "@palebluedot/shared/generated/palebluedot/agent/v1/agent.ts";
import type { HttpContext } from "../http/context.ts";
import { asPlatformError } from "../http/problem.ts";
import { streamResponse } from "../http/streams.ts";

export interface LogRequest {
  readonly allocation: Pick<Allocation, "id" | "state" | "server_id">;
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
    throw noLogs(
      "the allocation has ended, and its container and output were deleted with it",
      "Read logs while it is active, or send them elsewhere from inside the container.",
    );
  }
  if (allocation.server_id === null) {
    throw noLogs("the allocation is on no server yet", "Wait until its state is active.");
  }
  const watch = context.identity.watch(request.tokenId);
  const clientGone = new AbortController();
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
  const iterator = chunks[Symbol.asyncIterator]();
  const end = (): void => {
    watch.end();
    clientGone.abort();
  };
  const first = iterator.next();
  try {
    await settledWithin(first, refusalMs);
  } catch (error) {
    end();
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
