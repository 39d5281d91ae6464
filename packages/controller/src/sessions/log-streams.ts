import { randomUUID } from "node:crypto";
import { status, type ServerReadableStream, type sendUnaryData } from "@grpc/grpc-js";
import { PlatformError } from "@palebluedot/shared/errors.ts";
import type {
  LogChunk,
  UploadLogsRequest,
  UploadLogsResponse,
} from "@palebluedot/shared/generated/palebluedot/agent/v1/agent.ts";

/** How long an agent may take to open the stream that it was told to open. */
const openTimeoutMs = 15_000;
const maxStreams = 2000;
/** Held for a slow reader before the agent is made to wait. */
const highWaterBytes = 256 * 1024;
/** What a chunk costs beside its bytes: an empty one is not free. */
const chunkOverheadBytes = 64;

const costOfChunk = (chunk: LogChunk): number => chunk.data.length + chunkOverheadBytes;

type Upload = ServerReadableStream<UploadLogsRequest, UploadLogsResponse>;

interface Rendezvous {
  readonly serverId: string;
  readonly chunks: LogChunk[];
  bytes: number;
  upload: { readonly call: Upload; readonly callback: sendUnaryData<UploadLogsResponse> } | undefined;
  ended: boolean;
  error: PlatformError | undefined;
  /** Wakes the reader. */
  wake: () => void;
}

/** Brings a reader of logs and the stream that the agent opens for it together. */
export interface LogStreams {
  /** Ends when the agent ends, the signal aborts, or the reader stops. Throws PlatformError `log-stream-failed`. */
  open(
    serverId: string,
    tell: (streamId: string) => void,
    signal: AbortSignal,
  ): AsyncGenerator<LogChunk, void, undefined>;
  accept(serverId: string, call: Upload, callback: sendUnaryData<UploadLogsResponse>): void;
  /** The agent could not do it, or went away. `commandId` is the stream's id. */
  fail(serverId: string, streamId: string, error: PlatformError): void;
  failAllOf(serverId: string): void;
  count(): number;
}

export function createLogStreams(): LogStreams {
  const streams = new Map<string, Rendezvous>();

  function finish(stream: Rendezvous, error?: PlatformError): void {
    stream.error ??= error;
    stream.ended = true;
    stream.wake();
  }

  function take(stream: Rendezvous, chunks: readonly LogChunk[]): void {
    for (const chunk of chunks) {
      stream.chunks.push(chunk);
      stream.bytes += costOfChunk(chunk);
    }
    if (stream.bytes > highWaterBytes) stream.upload?.call.pause();
    stream.wake();
  }

  return {
    async *open(serverId, tell, signal) {
      if (streams.size >= maxStreams) {
        throw new PlatformError({
          code: "too-many-log-streams",
          kind: "exhausted",
          message: `${maxStreams} log streams are open already`,
        });
      }
      const streamId = randomUUID();
      const stream: Rendezvous = {
        serverId,
        chunks: [],
        bytes: 0,
        upload: undefined,
        ended: false,
        error: undefined,
        wake: () => undefined,
      };
      streams.set(streamId, stream);
      const onAbort = (): void => stream.wake();
      signal.addEventListener("abort", onAbort);
      const timer = setTimeout(() => {
        if (stream.upload !== undefined) return;
        finish(
          stream,
          new PlatformError({
            code: "log-stream-failed",
            kind: "unavailable",
            message: "the agent did not open the log stream in time",
          }),
        );
      }, openTimeoutMs);
      try {
        tell(streamId);
        for (;;) {
          if (signal.aborted) return;
          const chunk = stream.chunks.shift();
          if (chunk !== undefined) {
            stream.bytes -= costOfChunk(chunk);
            if (stream.bytes <= highWaterBytes / 2) stream.upload?.call.resume();
            yield chunk;
            continue;
          }
          if (stream.error !== undefined) throw stream.error;
          if (stream.ended) return;
          await new Promise<void>((resolve) => {
            stream.wake = resolve;
          });
        }
      } finally {
        clearTimeout(timer);
        signal.removeEventListener("abort", onAbort);
        streams.delete(streamId);
        // Nobody reads any more: the agent stops reading the container's log.
        if (!stream.ended) stream.upload?.callback({ code: status.CANCELLED, details: "the reader is gone" });
        stream.ended = true;
      }
    },

    accept(serverId, call, callback) {
      let stream: Rendezvous | undefined;
      call.on("data", (request: UploadLogsRequest) => {
        if (stream === undefined) {
          const found = streams.get(request.streamId);
          // A stream of another server, or a second upload for one stream, is no stream at all.
          if (
            found === undefined ||
            found.serverId !== serverId ||
            found.upload !== undefined ||
            found.ended
          ) {
            callback({ code: status.NOT_FOUND, details: "no such log stream" });
            call.destroy();
            return;
          }
          found.upload = { call, callback };
          stream = found;
        }
        if (!stream.ended) take(stream, request.chunks);
      });
      call.on("end", () => {
        if (stream === undefined) {
          callback({ code: status.INVALID_ARGUMENT, details: "no stream_id" });
          return;
        }
        if (stream.ended) return;
        finish(stream);
        callback(null, {});
      });
      const broken = (): void => {
        if (stream === undefined || stream.ended) return;
        finish(
          stream,
          new PlatformError({
            code: "log-stream-failed",
            kind: "unavailable",
            message: "the agent's log stream broke off",
            hint: "Open it again; --since continues where it ended.",
          }),
        );
      };
      call.on("error", broken);
      call.on("cancelled", broken);
    },

    fail(serverId, streamId, error) {
      const stream = streams.get(streamId);
      if (stream !== undefined && stream.serverId === serverId) finish(stream, error);
    },

    failAllOf(serverId) {
      for (const stream of streams.values()) {
        if (stream.serverId !== serverId || stream.ended) continue;
        finish(
          stream,
          new PlatformError({
            code: "agent-not-connected",
            kind: "unavailable",
            message: "the agent went away",
          }),
        );
      }
    },

    count: () => streams.size,
  };
}
