import type { ChildProcess } from "node:child_process";
import { fullJitterMs } from "@palebluedot/shared/backoff.ts";
import type { Clock } from "@palebluedot/shared/clock.ts";
import { errorMessage } from "@palebluedot/shared/errors.ts";
import type { Logger } from "@palebluedot/shared/logger.ts";
import { maxRowLength, parseCsvRow } from "./csv.ts";
import type { GpuReading } from "./reading.ts";
import { failureOf, rejectedField, type SmiFailure } from "./smi-failure.ts";
import type { SmiRunner } from "./smi-runner.ts";
import { cleanText } from "./values.ts";

/** Fields of the fast loop, and what an older driver calls them. All are cheap: 70 ms for 8 GPUs. */
const streamFields: readonly string[] = [
  "index",
  "uuid",
  "pci.bus_id",
  "driver_version",
  "name",
  "utilization.gpu",
  "utilization.memory",
  "utilization.encoder",
  "utilization.decoder",
  "memory.total",
  "memory.used",
  "memory.free",
  "memory.reserved",
  "temperature.gpu",
  "temperature.memory",
  "power.draw",
  "enforced.power.limit",
  "clocks.current.sm",
  "clocks.current.memory",
  "fan.speed",
  "pstate",
  "pcie.link.gen.current",
  "pcie.link.width.current",
  "clocks_event_reasons.active",
  "ecc.errors.corrected.volatile.total",
  "ecc.errors.uncorrected.volatile.total",
  "gpu_recovery_action",
];

const olderNames: ReadonlyMap<string, string> = new Map([
  ["clocks_event_reasons.active", "clocks_throttle_reasons.active"],
]);

export interface SmiStreamOptions {
  readonly runner: SmiRunner;
  readonly clock: Clock;
  readonly log: Logger;
  readonly random: () => number;
  readonly intervalMs: number;
  /** Silence beyond the interval that is taken for a hang. */
  readonly silenceMs: number;
  readonly backoff: { readonly baseMs: number; readonly capMs: number };
  /** GPUs to ask for; empty: all. A lost GPU would end the stream for those after it. */
  readonly select: () => readonly string[];
  /** One batch per tick of nvidia-smi: every GPU at most once. */
  readonly onReadings: (readings: readonly GpuReading[]) => void;
  /** Undefined when it answers (again). */
  readonly onFailure: (failure: SmiFailure | undefined) => void;
  /** Lines that are no row, such as "Unable to determine the device handle ...". Bounded. */
  readonly onOtherLine: (line: string) => void;
}

export interface SmiStream {
  start(): void;
  /** Ends the child; resolves when it is gone or given up. */
  stop(): Promise<void>;
  restarts(): number;
}

/** The long-lived `nvidia-smi -lms` child: started, watched, and restarted with back-off. */
export function createSmiStream(options: SmiStreamOptions): SmiStream {
  const { runner, clock, log } = options;
  let fields = [...streamFields];
  let stopping: AbortController | undefined;
  let loop: Promise<void> = Promise.resolve();
  let restarts = 0;

  /** One life of the child. Says whether it produced rows, and why it ended. */
  const live = async (
    signal: AbortSignal,
  ): Promise<{
    readonly rows: number;
    readonly rejected: string | undefined;
    readonly failure: SmiFailure;
  }> => {
    const selected = options.select();
    const child = runner.spawn("stream", [
      `--query-gpu=${fields.join(",")}`,
      "--format=csv,noheader,nounits",
      "-lms",
      String(options.intervalMs),
      ...(selected.length === 0 ? [] : ["-i", selected.join(",")]),
    ]);
    if (child === "stuck") {
      const pid = runner.abandoned().get("stream") ?? 0;
      return { rows: 0, rejected: undefined, failure: required(failureOf({ kind: "stuck", pid })) };
    }
    const watch = watchChild(child, signal, options, fields);
    const end = await watch;
    if (end.reason !== "exited") await runner.end("stream", child);
    const words = end.words;
    if (end.reason === "error") {
      return {
        rows: end.rows,
        rejected: undefined,
        failure: required(failureOf({ kind: "missing", message: words })),
      };
    }
    if (end.reason === "silent") {
      const afterMs = options.intervalMs + options.silenceMs;
      return {
        rows: end.rows,
        rejected: undefined,
        failure: required(failureOf({ kind: "timeout", afterMs })),
      };
    }
    const failure = failureOf({ kind: "failed", exitCode: end.exitCode, stdout: "", stderr: words });
    return { rows: end.rows, rejected: rejectedField(words), failure: required(failure) };
  };

  const run = async (signal: AbortSignal): Promise<void> => {
    let attempt = 0;
    while (!signal.aborted) {
      const life = await live(signal);
      if (signal.aborted) return;
      if (life.rejected !== undefined && fields.includes(life.rejected)) {
        const older = olderNames.get(life.rejected);
        fields = fields.flatMap((field) =>
          field !== life.rejected ? [field] : older === undefined ? [] : [older],
        );
        log.info({ field: life.rejected, instead: older }, "this driver does not know a query field");
        continue;
      }
      restarts += 1;
      attempt = life.rows > 0 ? 0 : attempt + 1;
      options.onFailure(life.failure);
      const delayMs = fullJitterMs(attempt, options.backoff, options.random);
      log.warn({ reason: life.failure.reason, delayMs }, "nvidia-smi's stream ended");
      await clock.sleep(delayMs, signal).catch(() => undefined);
    }
  };

  return {
    start: () => {
      if (stopping !== undefined) return;
      const control = new AbortController();
      stopping = control;
      loop = run(control.signal).catch((error: unknown) => {
        log.error({ error: errorMessage(error) }, "the nvidia-smi stream loop failed");
      });
    },
    stop: async () => {
      stopping?.abort();
      stopping = undefined;
      await loop;
    },
    restarts: () => restarts,
  };
}

interface ChildEnd {
  readonly reason: "exited" | "silent" | "error" | "aborted";
  readonly exitCode: number | undefined;
  readonly words: string;
  readonly rows: number;
}

const maxKeptWords = 2000;

function watchChild(
  child: ChildProcess,
  signal: AbortSignal,
  options: SmiStreamOptions,
  fields: readonly string[],
): Promise<ChildEnd> {
  return new Promise((resolve) => {
    let rows = 0;
    let words = "";
    let batch: GpuReading[] = [];
    let flushTimer: NodeJS.Timeout | undefined;
    let silenceTimer: NodeJS.Timeout | undefined;

    const flush = (): void => {
      clearTimeout(flushTimer);
      flushTimer = undefined;
      if (batch.length === 0) return;
      const readings = batch;
      batch = [];
      options.onReadings(readings);
    };
    const finish = (reason: ChildEnd["reason"], exitCode?: number): void => {
      clearTimeout(silenceTimer);
      flush();
      signal.removeEventListener("abort", onAbort);
      resolve({ reason, exitCode, words: cleanText(words, maxKeptWords), rows });
    };
    const onAbort = (): void => {
      finish("aborted");
    };
    const heard = (): void => {
      clearTimeout(silenceTimer);
      silenceTimer = setTimeout(() => {
        finish("silent");
      }, options.intervalMs + options.silenceMs);
    };
    const onLine = (line: string): void => {
      const reading = parseCsvRow(fields, line);
      if (reading === undefined) {
        if (words.length < maxKeptWords) words += `${line}\n`;
        options.onOtherLine(cleanText(line, 500));
        return;
      }
      // Only rows count as life: a driver that repeats an error for ever is not healthy.
      heard();
      if (rows === 0) options.onFailure(undefined);
      rows += 1;
      if (batch.some((earlier) => earlier.index === reading.index)) flush();
      batch.push(reading);
      // All rows of a tick arrive together; the next tick is at least a second away.
      flushTimer ??= setTimeout(flush, Math.min(200, options.intervalMs / 4));
    };

    heard();
    signal.addEventListener("abort", onAbort, { once: true });
    readLines(child.stdout, onLine);
    child.stderr?.on("data", (chunk: Buffer) => {
      if (words.length < maxKeptWords) words += chunk.toString("utf8", 0, maxKeptWords);
    });
    child.stderr?.on("error", () => undefined);
    child.once("error", (error) => {
      words = errorMessage(error);
      finish("error");
    });
    // "close" comes after the last line was read, "exit" may come before.
    child.once("close", (exitCode: number | null) => {
      finish("exited", exitCode ?? undefined);
    });
  });
}

/** Splits into lines with bounded memory: the tail of a line that never ends is dropped. */
function readLines(stream: NodeJS.ReadableStream | null, onLine: (line: string) => void): void {
  const decoder = new TextDecoder();
  let rest = "";
  stream?.on("data", (chunk: Buffer) => {
    const parts = (rest + decoder.decode(chunk, { stream: true })).split("\n");
    rest = (parts.pop() ?? "").slice(0, maxRowLength + 1);
    for (const line of parts) if (line.trim() !== "") onLine(line);
  });
  stream?.on("end", () => {
    if (rest.trim() !== "") onLine(rest);
    rest = "";
  });
  stream?.on("error", () => undefined);
}

function required(failure: SmiFailure | undefined): SmiFailure {
  return failure ?? { reason: "died", component: "nvidia-smi", message: "nvidia-smi ended" };
}
