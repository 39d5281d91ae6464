/**
 * Makes a simulated GPU server and changes it: what a test, the demo and the command use. A server is a
 * directory; the simulated nvidia-smi and container engine read it as processes of their own.
 */
import { createHash } from "node:crypto";
import { chmodSync, existsSync, mkdirSync, writeFileSync } from "node:fs";
import { uptime } from "node:os";
import { join, resolve } from "node:path";
import { fileURLToPath } from "node:url";
import { PlatformError } from "@palebluedot/shared/errors.ts";
import { readFaults, type Fault, type FaultKind } from "./nvidia-smi/faults.ts";
import { driverGenerations, models, type ModelName } from "./nvidia-smi/models.ts";
import { withProcesses } from "./nvidia-smi/readings.ts";
import {
  appendKernelLog,
  isAlive,
  paths,
  processStartTicks,
  readServer,
  readState,
  stateVersion,
  withLock,
  writeJson,
  type GpuIdentity,
  type GpuProcess,
  type ServerDescription,
} from "./nvidia-smi/state.ts";
import { writeSysfs } from "./sysfs.ts";
import { defaultXidMessage, kernelLogLine } from "./kernel-log.ts";

export type { Fault, FaultKind } from "./nvidia-smi/faults.ts";

export interface SimulatedServerOptions {
  /** Created when missing; must not hold another server. */
  readonly dir: string;
  readonly model: ModelName;
  readonly count: number;
  /** Driver generation: 535, 570, 580, 590 or 595. Default 580. */
  readonly driver?: number;
  /** Everything that identifies the server follows from it. Default 1. */
  readonly seed?: number;
  readonly hostname?: string;
  /** How many times faster than real time load and temperature follow. Default 1. */
  readonly speed?: number;
  /** Also write a small sysfs tree (DMI, network, PCI) under `sysfs/`. */
  readonly sysfs?: boolean;
  readonly nowMs?: number;
}

/** Hardware identity as an agent would read it from SMBIOS and the BMC. */
export interface SimulatedIdentity {
  readonly smbios_uuid: string;
  readonly serial: string;
  readonly manufacturer: string;
  readonly product: string;
  readonly mac_addresses: readonly string[];
  readonly bmc_mac: string;
  readonly bmc_address: string;
  readonly hostname: string;
}

export interface SimulatedServer {
  readonly stateDir: string;
  readonly description: ServerDescription;
  readonly identity: SimulatedIdentity;
  readonly gpus: readonly GpuIdentity[];
  /** The executable that acts as this server's nvidia-smi whatever its environment. */
  readonly nvidiaSmiPath: string;
  readonly kernelLogPath: string;
  /** Points an agent at this server; add DOCKER_HOST of its engine. */
  readonly env: Readonly<Record<string, string>>;
}

function digest(seed: number, what: string): string {
  return createHash("sha256").update(`palebluedot-simulator:${seed}:${what}`).digest("hex");
}

function uuidFrom(hex: string): string {
  return `${hex.slice(0, 8)}-${hex.slice(8, 12)}-4${hex.slice(13, 16)}-a${hex.slice(17, 20)}-${hex.slice(20, 32)}`;
}

/** Locally administered, so that no real card has it. */
function macFrom(hex: string): string {
  return `02:${(hex.slice(0, 10).match(/../g) ?? []).join(":")}`;
}

function makeGpus(model: ModelName, count: number, seed: number): GpuIdentity[] {
  const buses = models[model].buses;
  return Array.from({ length: count }, (_, index) => {
    const hex = digest(seed, `${model}:gpu:${index}`);
    const bus = (buses[index] ?? 0).toString(16).toUpperCase().padStart(2, "0");
    return {
      index,
      uuid: `GPU-${hex.slice(0, 8)}-${hex.slice(8, 12)}-${hex.slice(12, 16)}-${hex.slice(16, 20)}-${hex.slice(20, 32)}`,
      serial: `99${(BigInt(`0x${hex.slice(32, 44)}`) % 100_000_000_000n).toString().padStart(11, "0")}`,
      pciBusId: `00000000:${bus}:00.0`,
      minorNumber: index,
      numaNode: index < count / 2 || count === 1 ? 0 : 1,
      pdi: hex.slice(44, 60),
    };
  });
}

function makeIdentity(model: ModelName, seed: number, hostname: string): SimulatedIdentity {
  const hex = digest(seed, `${model}:server`);
  return {
    smbios_uuid: uuidFrom(hex),
    serial: `SIM${hex.slice(0, 9).toUpperCase()}`,
    ...models[model].chassis,
    mac_addresses: [macFrom(digest(seed, `${model}:nic:0`)), macFrom(digest(seed, `${model}:nic:1`))],
    bmc_mac: macFrom(digest(seed, `${model}:bmc`)),
    // Documentation addresses (RFC 5737): nothing answers there.
    bmc_address: `192.0.2.${1 + (Number.parseInt(hex.slice(60, 62), 16) % 254)}`,
    hostname,
  };
}

/** For a line of a shell script. */
const quote = (text: string): string => `'${text.replaceAll("'", String.raw`'\''`)}'`;

const launcher = fileURLToPath(new URL("../bin/nvidia-smi", import.meta.url));

/** Makes the directory of a server. Throws `simulated-server-invalid` or `simulated-server-exists`. */
export function createSimulatedServer(options: SimulatedServerOptions): SimulatedServer {
  const { model, count } = options;
  const driver = options.driver ?? 580;
  const seed = options.seed ?? 1;
  const dir = resolve(options.dir);
  const most = models[model]?.buses.length;
  if (most === undefined || !Number.isInteger(count) || count < 1 || count > most) {
    throw new PlatformError({
      code: "simulated-server-invalid",
      kind: "invalid",
      message: `a simulated server of model ${model} cannot have ${count} GPUs`,
      hint: `choose one of ${Object.keys(models).join(", ")} and 1 to ${most ?? 8} GPUs`,
    });
  }
  if (!driverGenerations.some((generation) => generation.major === driver)) {
    throw new PlatformError({
      code: "simulated-server-invalid",
      kind: "invalid",
      message: `there is no simulated driver ${driver}`,
      hint: `choose one of ${driverGenerations.map((generation) => generation.major).join(", ")}`,
    });
  }
  if (existsSync(paths.server(dir))) {
    throw new PlatformError({
      code: "simulated-server-exists",
      kind: "conflict",
      message: `${dir} already holds a simulated server`,
      hint: "choose an empty directory, or remove this one",
    });
  }
  mkdirSync(join(dir, "bin"), { recursive: true, mode: 0o750 });
  const nowMs = options.nowMs ?? Date.now();
  const hostname = options.hostname ?? `${model}-${digest(seed, `${model}:name`).slice(0, 4)}`;
  const preset = models[model];
  const description: ServerDescription = {
    version: stateVersion,
    model,
    driver,
    seed,
    hostname,
    createdAtMs: nowMs,
    speed: options.speed ?? 1,
    gpus: makeGpus(model, count, seed),
  };
  const identity = makeIdentity(model, seed, hostname);
  writeJson(paths.state(dir), {
    version: stateVersion,
    gpus: description.gpus.map(() => ({
      anchor: {
        atMs: nowMs,
        utilization: 0,
        powerWatts: preset.powerIdleWatts,
        temperature: preset.temperatureIdle,
        leavingMib: 0,
      },
      processes: [],
    })),
  });
  writeJson(paths.faults(dir), { faults: [] });
  writeJson(paths.identity(dir), identity);
  writeFileSync(paths.kernelLog(dir), "", { flag: "a", mode: 0o640 });
  writeFileSync(
    paths.launcher(dir),
    `#!/bin/sh\nPALEBLUEDOT_SIM_STATE=${quote(dir)}\nexport PALEBLUEDOT_SIM_STATE\nexec ${quote(launcher)} "$@"\n`,
  );
  chmodSync(paths.launcher(dir), 0o755);
  if (options.sysfs) writeSysfs(join(dir, "sysfs"), description, identity);
  // Last: a directory with this file is complete.
  writeJson(paths.server(dir), description);
  return openSimulatedServer(dir, identity);
}

/** A server made earlier. */
export function openSimulatedServer(directory: string, identity?: SimulatedIdentity): SimulatedServer {
  const dir = resolve(directory);
  const description = readServer(dir);
  const sysfs = join(dir, "sysfs");
  return {
    stateDir: dir,
    description,
    identity: identity ?? makeIdentity(description.model, description.seed, description.hostname),
    gpus: description.gpus,
    nvidiaSmiPath: paths.launcher(dir),
    kernelLogPath: paths.kernelLog(dir),
    env: {
      PALEBLUEDOT_SIM_STATE: dir,
      PALEBLUEDOT_NVIDIA_SMI: paths.launcher(dir),
      PALEBLUEDOT_KERNEL_LOG: paths.kernelLog(dir),
      PALEBLUEDOT_IDENTITY_FILE: paths.identity(dir),
      ...(existsSync(sysfs) ? { PALEBLUEDOT_SYSFS_ROOT: sysfs } : {}),
    },
  };
}

/** The GPU by index, UUID or PCI address. Throws `simulated-gpu-not-found`. */
function findGpu(server: ServerDescription, selector: number | string): GpuIdentity {
  const wanted = String(selector).toLowerCase();
  const found = server.gpus.find(
    (gpu) =>
      wanted === String(gpu.index) ||
      wanted === gpu.uuid.toLowerCase() ||
      gpu.pciBusId.toLowerCase().endsWith(wanted),
  );
  if (!found || wanted === "") {
    throw new PlatformError({
      code: "simulated-gpu-not-found",
      kind: "not-found",
      message: `the simulated server has no GPU ${selector}`,
      hint: "give an index, a UUID or a PCI address of `nvidia-smi -L` or `-q`",
    });
  }
  return found;
}

/** Puts a fault in force, replacing one of the same kind on the same GPU. Running nvidia-smi processes see it at their next look. */
export function setFault(dir: string, fault: Fault): void {
  const server = readServer(dir);
  const gpu = fault.gpu === undefined ? undefined : findGpu(server, fault.gpu).index;
  const nowMs = Date.now();
  const kept: Fault =
    fault.kind === "throttle" ? { ...fault, gpu, since_ms: fault.since_ms ?? nowMs } : { ...fault, gpu };
  withLock(dir, () => {
    const others = readFaults(dir, nowMs).filter(
      (other) => other.kind !== kept.kind || other.gpu !== kept.gpu,
    );
    writeJson(paths.faults(dir), { faults: [...others, kept] });
  });
}

/** Ends faults: all, those of one kind, those of one GPU, or both. */
export function clearFaults(
  dir: string,
  which: { readonly kind?: FaultKind; readonly gpu?: number | string } = {},
): void {
  const server = readServer(dir);
  const gpu = which.gpu === undefined ? undefined : findGpu(server, which.gpu);
  withLock(dir, () => {
    const kept = readFaults(dir, Date.now()).filter(
      (fault) =>
        (which.kind !== undefined && fault.kind !== which.kind) ||
        (gpu !== undefined && String(fault.gpu) !== String(gpu.index) && fault.gpu !== gpu.uuid),
    );
    writeJson(paths.faults(dir), { faults: kept });
  });
}

/** The faults in force. */
export function listFaults(dir: string): readonly Fault[] {
  return readFaults(dir, Date.now());
}

export interface GpuProcessOptions {
  readonly pid: number;
  readonly name: string;
  readonly memoryMib: number;
  /** 0 to 100. */
  readonly utilization: number;
  /** Stays on the GPU also when the pid is gone. Default false. */
  readonly stuck?: boolean;
}

function changeProcesses(
  dir: string,
  selector: number | string,
  change: (processes: readonly GpuProcess[], nowMs: number) => readonly GpuProcess[],
): void {
  const server = readServer(dir);
  const { index } = findGpu(server, selector);
  withLock(dir, () => {
    const state = readState(dir);
    const nowMs = Date.now();
    writeJson(paths.state(dir), {
      ...state,
      gpus: state.gpus.map((gpu, position) =>
        position === index
          ? withProcesses(server, gpu, change(gpu.processes.filter(isAlive), nowMs), nowMs)
          : gpu,
      ),
    });
  });
}

/** Puts a process on a GPU: its load, memory and heat follow. It leaves by itself when the pid ends. */
export function addGpuProcess(dir: string, gpu: number | string, options: GpuProcessOptions): void {
  const startTicks = processStartTicks(options.pid) ?? 0;
  changeProcesses(dir, gpu, (processes, nowMs) => [
    ...processes.filter((process) => process.pid !== options.pid),
    {
      pid: options.pid,
      startTicks,
      name: options.name,
      memoryMib: options.memoryMib,
      utilization: options.utilization,
      sinceMs: nowMs,
      stuck: options.stuck ?? false,
    },
  ]);
}

/** Takes a process off a GPU, also a stuck one. */
export function removeGpuProcess(dir: string, gpu: number | string, pid: number): void {
  changeProcesses(dir, gpu, (processes) => processes.filter((process) => process.pid !== pid));
}

export interface XidOptions {
  readonly gpu: number | string;
  readonly xid: number;
  /** What follows the number; by default the usual text of that Xid. */
  readonly message?: string;
  readonly pid?: number;
  readonly processName?: string;
  /** `kmsg`: records as /dev/kmsg gives them. `dmesg`: `dmesg -T`. Default kmsg. */
  readonly form?: "kmsg" | "dmesg";
}

/** Writes an Xid line of a GPU to the simulated kernel log. */
export function appendXid(dir: string, options: XidOptions): void {
  const gpu = findGpu(readServer(dir), options.gpu);
  const address = gpu.pciBusId.slice(4, -2).toLowerCase();
  const who =
    options.pid === undefined
      ? "'<unknown>', name=<unknown>"
      : `${options.pid}, name=${options.processName ?? "python3"}`;
  const message = options.message ?? defaultXidMessage(options.xid);
  writeKernelMessage(dir, `NVRM: Xid (PCI:${address}): ${options.xid}, pid=${who}, ${message}`, options.form);
}

/** Writes any line to the simulated kernel log. */
function writeKernelMessage(dir: string, message: string, form: "kmsg" | "dmesg" = "kmsg"): void {
  withLock(dir, () => {
    appendKernelLog(dir, kernelLogLine(dir, message, form, Date.now(), uptime()));
  });
}
