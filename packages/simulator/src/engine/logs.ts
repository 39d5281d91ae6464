/** A container's log: a file of JSON lines, served as the engine's multiplexed stream. */
import { existsSync, openSync, readSync, closeSync, fstatSync } from "node:fs";
import { z } from "zod";
import { flag, type Call } from "./http.ts";

const lineSchema = z.object({ stream: z.enum(["stdout", "stderr"]), time: z.string(), log: z.string() });
type LogLine = z.infer<typeof lineSchema>;

const pollMs = 100;
const chunkBytes = 64 << 10;

/** The engine's frame: stream number, three zero bytes, length, payload. */
function frame(stream: "stdout" | "stderr", payload: string): Buffer {
  const body = Buffer.from(payload, "utf8");
  const head = Buffer.alloc(8);
  head[0] = stream === "stdout" ? 1 : 2;
  head.writeUInt32BE(body.length, 4);
  return Buffer.concat([head, body]);
}

/** Reads the complete lines a file has gained; starts again when it was rotated. */
function createTail(file: string): () => LogLine[] {
  let offset = 0;
  let inode = 0;
  let rest: Buffer = Buffer.alloc(0);
  return () => {
    if (!existsSync(file)) return [];
    const descriptor = openSync(file, "r");
    try {
      const stat = fstatSync(descriptor);
      if (stat.ino !== inode || stat.size < offset) {
        inode = stat.ino;
        offset = 0;
        rest = Buffer.alloc(0);
      }
      const lines: LogLine[] = [];
      const buffer = Buffer.alloc(chunkBytes);
      for (;;) {
        const read = readSync(descriptor, buffer, 0, chunkBytes, offset);
        if (read === 0) return lines;
        offset += read;
        // A character may be cut at the end of a chunk: split bytes, not text.
        let data = Buffer.concat([rest, buffer.subarray(0, read)]);
        for (let end = data.indexOf(10); end >= 0; end = data.indexOf(10)) {
          try {
            lines.push(lineSchema.parse(JSON.parse(data.subarray(0, end).toString("utf8"))));
          } catch {
            // A line torn by a killed container.
          }
          data = data.subarray(end + 1);
        }
        rest = data;
      }
    } finally {
      closeSync(descriptor);
    }
  };
}

/** A time parameter: seconds since the epoch with a fraction, or RFC 3339; in milliseconds. */
function time(query: URLSearchParams, name: string): number | undefined {
  const text = query.get(name);
  if (text === null || text === "" || text === "0") return undefined;
  const seconds = Number(text);
  const ms = Number.isNaN(seconds) ? Date.parse(text) : seconds * 1000;
  return Number.isNaN(ms) ? undefined : ms;
}

/** Serves `GET /containers/:id/logs`. With `follow` it ends when the container has ended and all was sent. */
export async function serveLogs(
  call: Call,
  file: string,
  options: {
    readonly tty: boolean;
    readonly isRunning: () => boolean;
    readonly sleep: (ms: number) => Promise<unknown>;
  },
): Promise<void> {
  const { query, response } = call;
  const timestamps = flag(query, "timestamps");
  const follow = flag(query, "follow");
  const since = time(query, "since");
  const until = time(query, "until");
  const tailText = query.get("tail") ?? "all";
  const tailCount =
    tailText === "all" || tailText === "" ? Number.POSITIVE_INFINITY : Math.max(0, Number(tailText) || 0);
  const wanted = (line: LogLine): boolean =>
    flag(query, line.stream) &&
    (since === undefined || Date.parse(line.time) >= since) &&
    (until === undefined || Date.parse(line.time) <= until);
  response.writeHead(200, {
    "Content-Type": options.tty
      ? "application/vnd.docker.raw-stream"
      : "application/vnd.docker.multiplexed-stream",
  });
  response.flushHeaders();
  const send = async (line: LogLine): Promise<void> => {
    const text = timestamps ? `${line.time.replace("Z", "000000Z")} ${line.log}` : line.log;
    const more = response.write(options.tty ? text : frame(line.stream, text));
    if (!more && !response.destroyed) {
      await new Promise<void>((resolve) => {
        const done = (): void => {
          response.off("drain", done);
          response.off("close", done);
          resolve();
        };
        response.on("drain", done);
        response.on("close", done);
      });
    }
  };
  const tail = createTail(file);
  const first = tail().filter(wanted);
  for (const line of first.slice(Math.max(0, first.length - tailCount))) await send(line);
  while (follow && !response.destroyed) {
    // Asked before reading: what was written until the end is then still read.
    const running = options.isRunning();
    for (const line of tail().filter(wanted)) await send(line);
    if (!running || (until !== undefined && Date.now() > until)) break;
    await options.sleep(pollMs);
  }
  response.end();
}
