import { createHash } from "node:crypto";
import { constants } from "node:fs";
import { mkdir, open, readFile, rename, writeFile, type FileHandle } from "node:fs/promises";
import { join } from "node:path";
import type { Clock } from "@palebluedot/shared/clock.ts";
import { errorMessage } from "@palebluedot/shared/errors.ts";
import type { Logger } from "@palebluedot/shared/logger.ts";
import { z } from "zod";
import { maxKernelLineLength, parseKernelLine, type KernelGpuEvent } from "./kernel-log.ts";

export interface KernelLogFollowerOptions {
  /** A log file that the system writes, or /dev/kmsg. */
  readonly path: string;
  /** Where the position is remembered; undefined: it is not. */
  readonly stateDir: string | undefined;
  readonly bootId: string;
  readonly clock: Clock;
  readonly log: Logger;
  readonly pollMs: number;
  readonly onEvent: (event: KernelGpuEvent) => void;
  /** Undefined when it can be read (again). */
  readonly onFailure: (message: string | undefined) => void;
}

export interface KernelLogFollower {
  start(): void;
  stop(): Promise<void>;
}

/**
 * Where reading goes on. The first start ever begins at the end (an old log holds old news); later ones
 * continue, so that an Xid that came while the agent was away is told. A file is recognised by inode and
 * a digest of its first bytes, because an inode is used again after a rotation.
 */
const positionSchema = z.strictObject({
  path: z.string(),
  bootId: z.string(),
  inode: z.number(),
  headDigest: z.string(),
  headLength: z.int().min(0),
  offset: z.int().min(0),
  /** /dev/kmsg: the last record's sequence number; -1 before the first. */
  sequence: z.int(),
});
type Position = z.infer<typeof positionSchema>;

const chunkBytes = 64 * 1024;
const headBytes = 256;
/** A log that grew more than this while nobody read is read from here on; older lines are old news. */
const maxBacklogBytes = 8 * 1024 * 1024;

export function createKernelLogFollower(options: KernelLogFollowerOptions): KernelLogFollower {
  const { clock, log } = options;
  const positionFile =
    options.stateDir === undefined ? undefined : join(options.stateDir, "kernel-log-position.json");
  let control: AbortController | undefined;
  let loop: Promise<void> = Promise.resolve();
  let stored = "";

  const load = async (): Promise<Position | undefined> => {
    if (positionFile === undefined) return undefined;
    try {
      const position = positionSchema.parse(JSON.parse(await readFile(positionFile, "utf8")));
      return position.path === options.path ? position : undefined;
    } catch {
      // Absent or damaged: begin at the end, as on the first start.
      return undefined;
    }
  };

  const save = async (position: Position): Promise<void> => {
    const text = JSON.stringify(position);
    if (positionFile === undefined || options.stateDir === undefined || text === stored) return;
    await mkdir(options.stateDir, { recursive: true });
    const temporary = `${positionFile}.tmp`;
    await writeFile(temporary, text, { mode: 0o600 });
    await rename(temporary, positionFile);
    stored = text;
  };

  const onLine = (line: string): void => {
    const event = parseKernelLine(line);
    if (event !== undefined) options.onEvent(event);
  };

  const run = async (signal: AbortSignal): Promise<void> => {
    let position = await load();
    let healthy: boolean | undefined;
    while (!signal.aborted) {
      try {
        position = await readOnce(options.path, options.bootId, position, onLine);
        await save(position);
        if (healthy !== true) options.onFailure(undefined);
        healthy = true;
      } catch (error) {
        // A file that is not there yet will be new from its first line on.
        if ((error as NodeJS.ErrnoException).code === "ENOENT") position ??= nothingRead(options);
        if (healthy !== false) {
          const message = errorMessage(error);
          log.warn({ path: options.path, error: message }, "the kernel log cannot be read");
          options.onFailure(message);
        }
        healthy = false;
      }
      await clock.sleep(options.pollMs, signal).catch(() => undefined);
    }
  };

  return {
    start: () => {
      if (control !== undefined) return;
      control = new AbortController();
      loop = run(control.signal);
    },
    stop: async () => {
      control?.abort();
      control = undefined;
      await loop;
    },
  };
}

function nothingRead(options: KernelLogFollowerOptions): Position {
  return {
    path: options.path,
    bootId: options.bootId,
    inode: 0,
    headDigest: "",
    headLength: 0,
    offset: 0,
    sequence: -1,
  };
}

/** Reads what is new since `position` and returns the new one. Undefined: begin at the end. */
async function readOnce(
  path: string,
  bootId: string,
  position: Position | undefined,
  onLine: (line: string) => void,
): Promise<Position> {
  // /dev/kmsg without O_NONBLOCK would hold a thread of the pool until the kernel says something.
  const handle = await open(path, constants.O_RDONLY | constants.O_NONBLOCK);
  try {
    const stat = await handle.stat();
    if (stat.isCharacterDevice()) return await readDevice(handle, path, bootId, position, onLine);
    return await readFileTail(handle, path, bootId, position, stat, onLine);
  } finally {
    await handle.close();
  }
}

async function readFileTail(
  handle: FileHandle,
  path: string,
  bootId: string,
  position: Position | undefined,
  stat: { readonly ino: number; readonly size: number },
  onLine: (line: string) => void,
): Promise<Position> {
  const head = await readAt(handle, 0, headBytes);
  const same =
    position !== undefined &&
    position.inode === stat.ino &&
    stat.size >= position.offset &&
    digest(head.subarray(0, position.headLength)) === position.headDigest;
  // A rotated or truncated file is new from its beginning; a file seen for the first time is old news.
  let offset = position === undefined ? stat.size : same ? position.offset : 0;
  offset = Math.max(offset, stat.size - maxBacklogBytes);
  let consumed = offset;
  let rest: Buffer = Buffer.alloc(0);
  while (offset < stat.size) {
    const chunk = await readAt(handle, offset, Math.min(chunkBytes, stat.size - offset));
    if (chunk.length === 0) break;
    offset += chunk.length;
    rest = Buffer.concat([rest, chunk]);
    let start = 0;
    for (let end = rest.indexOf(10, start); end >= 0; end = rest.indexOf(10, start)) {
      onLine(decode(rest.subarray(start, end)));
      start = end + 1;
    }
    rest = rest.subarray(start);
    // Half a line is read again when its end is there, unless it can be no kernel message.
    if (rest.length > maxKernelLineLength) rest = rest.subarray(rest.length);
    consumed = offset - rest.length;
  }
  const headLength = Math.min(head.length, headBytes);
  return {
    path,
    bootId,
    inode: stat.ino,
    headDigest: digest(head.subarray(0, headLength)),
    headLength,
    offset: consumed,
    sequence: -1,
  };
}

async function readDevice(
  handle: FileHandle,
  path: string,
  bootId: string,
  position: Position | undefined,
  onLine: (line: string) => void,
): Promise<Position> {
  // A reboot starts the sequence again: then every record is new.
  const known = position?.bootId === bootId ? position.sequence : position === undefined ? undefined : -1;
  let last = known ?? -1;
  const buffer = Buffer.alloc(maxKernelLineLength * 2);
  for (;;) {
    let length: number;
    try {
      length = (await handle.read(buffer, 0, buffer.length, null)).bytesRead;
    } catch (error) {
      const code = (error as NodeJS.ErrnoException).code;
      // EAGAIN: nothing more. EPIPE: records were overwritten meanwhile, the next read goes on.
      if (code === "EPIPE") continue;
      if (code === "EAGAIN") break;
      throw error;
    }
    if (length === 0) break;
    // One record a read; continuation lines after the first are key=value pairs.
    const line = decode(buffer.subarray(0, length)).split("\n")[0] ?? "";
    const sequence = Number(/^\d+,(\d+),/.exec(line)?.[1] ?? Number.NaN);
    if (!Number.isSafeInteger(sequence) || sequence <= last) continue;
    last = sequence;
    if (known !== undefined) onLine(line);
  }
  return { path, bootId, inode: 0, headDigest: "", headLength: 0, offset: 0, sequence: last };
}

async function readAt(handle: FileHandle, offset: number, length: number): Promise<Buffer> {
  const buffer = Buffer.alloc(length);
  const { bytesRead } = await handle.read(buffer, 0, length, offset);
  return buffer.subarray(0, bytesRead);
}

function decode(bytes: Buffer): string {
  return new TextDecoder().decode(bytes);
}

function digest(bytes: Buffer): string {
  return createHash("sha256").update(bytes).digest("hex").slice(0, 32);
}
