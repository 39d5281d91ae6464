import { spawn, type ChildProcess } from "node:child_process";
import type { Clock } from "@palebluedot/shared/clock.ts";
import { errorMessage } from "@palebluedot/shared/errors.ts";
import type { Logger } from "@palebluedot/shared/logger.ts";
import { cleanText } from "./values.ts";

/**
 * Runs nvidia-smi under a watchdog. A wedged driver makes any call hang, at worst in uninterruptible
 * sleep where even SIGKILL does nothing; nothing here ever waits for such a child. It is abandoned, and
 * while it lives no second one of its kind is started, so that they cannot pile up.
 */
type SmiKind = "document" | "list" | "topology" | "apps" | "memory" | "stream";

export type SmiResult =
  | { readonly kind: "ok"; readonly stdout: string; readonly stderr: string }
  | {
      readonly kind: "failed";
      /** Undefined when a signal ended it. */
      readonly exitCode: number | undefined;
      readonly stdout: string;
      readonly stderr: string;
    }
  | { readonly kind: "missing"; readonly message: string }
  | { readonly kind: "timeout"; readonly afterMs: number }
  /** An earlier child of this kind is still there although it was killed. */
  | { readonly kind: "stuck"; readonly pid: number };

export interface SmiRunnerOptions {
  readonly path: string;
  readonly env: Readonly<Record<string, string | undefined>>;
  readonly clock: Clock;
  readonly log: Logger;
  /** Between SIGTERM, SIGKILL and giving up, each. Default 2000. */
  readonly killGraceMs?: number | undefined;
  /** Sends a signal; replaced in tests, because nobody can order an uninterruptible process. */
  readonly kill?: ((child: ChildProcess, signal: NodeJS.Signals) => void) | undefined;
}

export interface SmiRunner {
  /** Resolves at the deadline at the latest, never rejects. Runs of one kind follow each other. */
  run(kind: Exclude<SmiKind, "stream">, args: readonly string[], deadlineMs: number): Promise<SmiResult>;
  /** Starts a long-lived child; "stuck" while an abandoned predecessor lives. */
  spawn(kind: SmiKind, args: readonly string[]): ChildProcess | "stuck";
  /** SIGTERM, SIGKILL, then abandon. Resolves when it is gone or given up; true when it is gone. */
  end(kind: SmiKind, child: ChildProcess): Promise<boolean>;
  /** Process ids that were killed and are still there, by kind. */
  abandoned(): ReadonlyMap<SmiKind, number>;
  /** Kills what runs. Does not wait for what cannot be killed. */
  stop(): Promise<void>;
}

const maxStdoutBytes = 16 * 1024 * 1024;
const maxStderrBytes = 64 * 1024;
/** An exited child whose grandchild holds the pipe open: what came so far is all there is. */
const drainMs = 500;

export function createSmiRunner(options: SmiRunnerOptions): SmiRunner {
  const { clock, log } = options;
  const killGraceMs = options.killGraceMs ?? 2000;
  const kill = options.kill ?? killGroup;
  const living = new Map<ChildProcess, SmiKind>();
  const abandoned = new Map<SmiKind, ChildProcess>();
  const tails = new Map<SmiKind, Promise<unknown>>();

  const start = (kind: SmiKind, args: readonly string[]): ChildProcess | "stuck" => {
    const old = abandoned.get(kind);
    if (old !== undefined) {
      if (!hasEnded(old)) return "stuck";
      abandoned.delete(kind);
    }
    const child = spawn(options.path, args, {
      env: { ...withoutSecrets(options.env), LC_ALL: "C" },
      stdio: ["ignore", "pipe", "pipe"],
      // A group of its own, so that a wrapper script cannot leave the real program behind.
      detached: true,
    });
    living.set(child, kind);
    const forget = (): void => {
      living.delete(child);
      if (abandoned.get(kind) === child) abandoned.delete(kind);
    };
    child.once("exit", forget);
    child.once("error", forget);
    return child;
  };

  const end = async (kind: SmiKind, child: ChildProcess): Promise<boolean> => {
    for (const signal of ["SIGTERM", "SIGKILL"] as const) {
      if (hasEnded(child)) return true;
      kill(child, signal);
      if (await endsWithin(child, killGraceMs, clock)) return true;
    }
    if (hasEnded(child)) return true;
    abandoned.set(kind, child);
    // Neither the process nor its pipes may keep the agent from ending.
    child.unref();
    child.stdout?.destroy();
    child.stderr?.destroy();
    log.error({ child_pid: child.pid, kind }, "nvidia-smi cannot be killed; abandoned");
    return false;
  };

  const once = (kind: SmiKind, args: readonly string[], deadlineMs: number): Promise<SmiResult> =>
    new Promise((resolve) => {
      const child = start(kind, args);
      if (child === "stuck") {
        resolve({ kind: "stuck", pid: abandoned.get(kind)?.pid ?? 0 });
        return;
      }
      const stdout = collect(child.stdout, maxStdoutBytes, () => void end(kind, child));
      const stderr = collect(child.stderr, maxStderrBytes, () => undefined);
      const deadline = setTimeout(() => {
        resolve({ kind: "timeout", afterMs: deadlineMs });
        void end(kind, child);
      }, deadlineMs);
      const finish = (exitCode: number | null): void => {
        clearTimeout(deadline);
        const output = { stdout: stdout(), stderr: stderr() };
        resolve(
          exitCode === 0
            ? { kind: "ok", ...output }
            : { kind: "failed", exitCode: exitCode ?? undefined, ...output },
        );
      };
      child.once("error", (error) => {
        clearTimeout(deadline);
        resolve({ kind: "missing", message: cleanText(errorMessage(error)) });
      });
      child.once("close", finish);
      child.once("exit", (exitCode) => {
        setTimeout(() => {
          finish(exitCode);
        }, drainMs).unref();
      });
    });

  return {
    run: (kind, args, deadlineMs) => {
      const turn = (tails.get(kind) ?? Promise.resolve()).then(() => once(kind, args, deadlineMs));
      tails.set(kind, turn);
      return turn;
    },
    spawn: start,
    end,
    abandoned: () =>
      new Map(
        [...abandoned].filter(([, child]) => !hasEnded(child)).map(([kind, child]) => [kind, child.pid ?? 0]),
      ),
    stop: async () => {
      await Promise.all([...living].map(([child, kind]) => end(kind, child)));
    },
  };
}

function hasEnded(child: ChildProcess): boolean {
  return child.exitCode !== null || child.signalCode !== null || child.pid === undefined;
}

async function endsWithin(child: ChildProcess, ms: number, clock: Clock): Promise<boolean> {
  const given = new AbortController();
  const onExit = (): void => {
    given.abort();
  };
  child.once("exit", onExit);
  try {
    await clock.sleep(ms, given.signal);
  } catch {
    // Aborted: it has exited.
  } finally {
    child.removeListener("exit", onExit);
  }
  return hasEnded(child);
}

function killGroup(child: ChildProcess, signal: NodeJS.Signals): void {
  if (child.pid === undefined) return;
  try {
    process.kill(-child.pid, signal);
  } catch {
    // Gone between the check and the signal.
  }
}

/** Collects at most `maxBytes`, as UTF-8 with U+FFFD for what is none; calls back once when there is more. */
function collect(
  stream: NodeJS.ReadableStream | null,
  maxBytes: number,
  onOverflow: () => void,
): () => string {
  const chunks: Buffer[] = [];
  let size = 0;
  stream?.on("data", (chunk: Buffer) => {
    const before = size;
    size += chunk.length;
    if (size <= maxBytes) chunks.push(chunk);
    else if (before <= maxBytes) onOverflow();
  });
  // A pipe that breaks because the child was killed is no news.
  stream?.on("error", () => undefined);
  return () => new TextDecoder().decode(Buffer.concat(chunks));
}

/** nvidia-smi needs no secret of the agent, so it gets none. */
function withoutSecrets(
  env: Readonly<Record<string, string | undefined>>,
): Record<string, string | undefined> {
  return Object.fromEntries(
    Object.entries(env).filter(([name]) => !/TOKEN|PASSWORD|SECRET|CREDENTIAL/i.test(name)),
  );
}
