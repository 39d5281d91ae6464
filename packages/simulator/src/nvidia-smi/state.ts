/**
 * The state of one simulated server: a directory of small JSON files that nvidia-smi, the engine and the
 * command share. Written by rename under a lock file, so that a reader never sees half a document.
 * Synchronous and free of other packages, because nvidia-smi is started often and must start fast.
 */
import {
  appendFileSync,
  closeSync,
  mkdirSync,
  openSync,
  readFileSync,
  renameSync,
  rmSync,
  statSync,
  writeFileSync,
} from "node:fs";
import { join } from "node:path";
import type { ModelName } from "./models.ts";

export const stateVersion = 1;

/** What never changes after creation. */
export interface ServerDescription {
  readonly version: number;
  readonly model: ModelName;
  readonly driver: number;
  readonly seed: number;
  readonly hostname: string;
  readonly createdAtMs: number;
  /** How many times faster than real time temperature and load follow; 1 for users, more in tests. */
  readonly speed: number;
  readonly gpus: readonly GpuIdentity[];
}

export interface GpuIdentity {
  readonly index: number;
  readonly uuid: string;
  readonly serial: string;
  /** Long form, e.g. 00000000:1B:00.0. */
  readonly pciBusId: string;
  readonly minorNumber: number;
  readonly numaNode: number;
  /** Board identifier of the driver, 16 hexadecimal digits. */
  readonly pdi: string;
}

/** A process that has a context on a GPU. */
export interface GpuProcess {
  readonly pid: number;
  /** Start time in clock ticks since boot, so that a reused pid is not taken for this process; 0 when unknown. */
  readonly startTicks: number;
  readonly name: string;
  readonly memoryMib: number;
  /** 0 to 100. */
  readonly utilization: number;
  readonly sinceMs: number;
  /** Stays also when the pid is gone. */
  readonly stuck: boolean;
}

/** Values at one moment, from which the readings of any later moment follow. */
export interface GpuAnchor {
  readonly atMs: number;
  readonly utilization: number;
  readonly powerWatts: number;
  readonly temperature: number;
  /** Memory of processes that have left, still on its way back. */
  readonly leavingMib: number;
}

export interface GpuState {
  readonly anchor: GpuAnchor;
  readonly processes: readonly GpuProcess[];
}

export interface ServerState {
  readonly version: number;
  /** One per GPU, by index. */
  readonly gpus: readonly GpuState[];
}

export const paths = {
  server: (dir: string): string => join(dir, "server.json"),
  state: (dir: string): string => join(dir, "state.json"),
  faults: (dir: string): string => join(dir, "faults.json"),
  kernelLog: (dir: string): string => join(dir, "kernel.log"),
  identity: (dir: string): string => join(dir, "identity.json"),
  launcher: (dir: string): string => join(dir, "bin", "nvidia-smi"),
};

/** Writes beside the target and renames; the file is readable by its owner and group only. */
export function writeJson(path: string, value: unknown): void {
  const temporary = `${path}.${process.pid}.${Math.trunc(performance.now() * 1000)}.tmp`;
  writeFileSync(temporary, `${JSON.stringify(value, undefined, 1)}\n`, { mode: 0o640 });
  renameSync(temporary, path);
}

function readJson(path: string): unknown {
  return JSON.parse(readFileSync(path, "utf8")) as unknown;
}

/** Throws when the directory holds no simulated server, or one of another version. */
export function readServer(dir: string): ServerDescription {
  const server = readJson(paths.server(dir)) as ServerDescription;
  if (server.version !== stateVersion || !Array.isArray(server.gpus)) {
    throw new Error(`${paths.server(dir)} is not the state of a simulated server of version ${stateVersion}`);
  }
  return server;
}

export function readState(dir: string): ServerState {
  return readJson(paths.state(dir)) as ServerState;
}

const lockWaitMs = 5_000;
const lockStaleMs = 10_000;

function pause(ms: number): void {
  Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, ms);
}

/**
 * Runs `change` alone among all processes that use this directory. Throws after 5 s of waiting; a lock older
 * than 10 s belonged to a process that was killed, and is broken.
 */
export function withLock<T>(dir: string, change: () => T): T {
  const lock = join(dir, "lock");
  const deadline = Date.now() + lockWaitMs;
  for (;;) {
    try {
      closeSync(openSync(lock, "wx"));
      break;
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code !== "EEXIST") throw error;
    }
    try {
      if (Date.now() - statSync(lock).mtimeMs > lockStaleMs) {
        // Rename first: of two that break the same stale lock only one succeeds.
        const broken = `${lock}.${process.pid}.broken`;
        renameSync(lock, broken);
        rmSync(broken, { force: true });
        continue;
      }
    } catch {
      continue;
    }
    if (Date.now() > deadline) throw new Error(`the lock ${lock} was held for more than ${lockWaitMs} ms`);
    pause(2);
  }
  try {
    return change();
  } finally {
    rmSync(lock, { force: true });
  }
}

/** Start time of a process in clock ticks since boot; undefined when there is no such process. */
export function processStartTicks(pid: number): number | undefined {
  try {
    const stat = readFileSync(`/proc/${pid}/stat`, "latin1");
    // The command name may hold spaces and brackets: fields are counted after the last ")".
    const fields = stat.slice(stat.lastIndexOf(")") + 2).split(" ");
    return fields[0] === "Z" || fields[0] === "X" ? undefined : Number(fields[19]);
  } catch {
    // Not Linux, or no such process.
  }
  try {
    process.kill(pid, 0);
    return 0;
  } catch (error) {
    return (error as NodeJS.ErrnoException).code === "EPERM" ? 0 : undefined;
  }
}

export function isAlive(entry: GpuProcess): boolean {
  if (entry.stuck) return true;
  const ticks = processStartTicks(entry.pid);
  return ticks !== undefined && (entry.startTicks === 0 || ticks === 0 || ticks === entry.startTicks);
}

/** Appends to the simulated kernel log, creating it. */
export function appendKernelLog(dir: string, line: string): void {
  mkdirSync(dir, { recursive: true });
  appendFileSync(paths.kernelLog(dir), `${line}\n`);
}
