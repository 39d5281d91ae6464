import { spawn, type ChildProcess } from "node:child_process";
import { closeSync, existsSync, openSync, readFileSync } from "node:fs";
import { fileURLToPath } from "node:url";

/** A part of the platform run as its own process, as on a real host: it can be killed and started again. */
export interface RunningProcess {
  readonly pid: number;
  readonly logFile: string;
  readonly exited: Promise<{ readonly code: number | null; readonly signal: NodeJS.Signals | null }>;
  isRunning(): boolean;
  /** SIGTERM, then SIGKILL after the grace time. */
  stop(graceMs?: number): Promise<void>;
  /** SIGKILL: nothing tidies up. */
  kill(): Promise<void>;
  /** The end of its log, for an error message. */
  logTail(): string;
}

const root = fileURLToPath(new URL("../../../../", import.meta.url));

/** Starts `packages/<part>/src/main.ts` under this very Node, its output appended to `logFile`. */
export function startPart(
  part: "controller" | "agent" | "simulator",
  args: readonly string[],
  options: {
    readonly env: Readonly<Record<string, string>>;
    readonly logFile: string;
    readonly wrap?: readonly string[];
    readonly nodeFlags?: readonly string[];
    /** In place of this Node and the part's source: a built program and its flags. */
    readonly program?: readonly string[];
  },
): RunningProcess {
  const log = openSync(options.logFile, "a", 0o600);
  const program = options.program ?? [
    process.execPath,
    ...(options.nodeFlags ?? []),
    `${root}packages/${part}/src/main.ts`,
  ];
  const command = [...(options.wrap ?? []), ...program, ...args];
  const child: ChildProcess = spawn(command[0] ?? process.execPath, command.slice(1), {
    cwd: root,
    // Nothing is inherited but what a program needs to start: a developer's own settings must not leak in.
    env: { PATH: process.env["PATH"] ?? "", HOME: process.env["HOME"] ?? "/", ...options.env },
    stdio: ["ignore", log, log],
  });
  closeSync(log);
  let running = true;
  const exited = new Promise<{ code: number | null; signal: NodeJS.Signals | null }>((resolve) => {
    child.once("error", () => {
      running = false;
      resolve({ code: 127, signal: null });
    });
    child.once("exit", (code, signal) => {
      running = false;
      resolve({ code, signal });
    });
  });
  const signal = async (name: NodeJS.Signals): Promise<void> => {
    if (running) child.kill(name);
    await exited;
  };
  return {
    pid: child.pid ?? -1,
    logFile: options.logFile,
    exited,
    isRunning: () => running,
    kill: () => signal("SIGKILL"),
    async stop(graceMs = 15_000) {
      const timer = setTimeout(() => child.kill("SIGKILL"), graceMs);
      await signal("SIGTERM");
      clearTimeout(timer);
    },
    logTail: () => (existsSync(options.logFile) ? readFileSync(options.logFile, "utf8").slice(-4000) : ""),
  };
}
