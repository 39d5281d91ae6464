/**
 * What a simulated GPU reads at one moment. Load, power and temperature follow the processes on the GPU with a
 * first-order lag from a recorded anchor, so that two processes that ask at the same moment see the same, and
 * no daemon is needed. Noise is a function of seed, GPU and second.
 */
import { findFault, type Fault, type ThrottleReason } from "./faults.ts";
import { models, type GpuModel } from "./models.ts";
import {
  isAlive,
  readState,
  withLock,
  writeJson,
  paths,
  type GpuAnchor,
  type GpuIdentity,
  type GpuProcess,
  type GpuState,
  type ServerDescription,
  type ServerState,
} from "./state.ts";

const utilizationLagMs = 1_500;
const powerLagMs = 2_500;
const temperatureLagMs = 20_000;
const leavingMemoryLagMs = 250;
const memoryRampMs = 2_000;

export interface GpuReading {
  readonly identity: GpuIdentity;
  readonly model: GpuModel;
  readonly atMs: number;
  /** 0 to 100. */
  readonly utilization: number;
  readonly memoryUtilization: number;
  readonly memoryUsedMib: number;
  readonly memoryFreeMib: number;
  readonly powerAverageWatts: number;
  readonly powerInstantWatts: number;
  readonly temperature: number;
  readonly memoryTemperature: number;
  readonly graphicsClock: number;
  readonly videoClock: number;
  readonly performanceState: string;
  readonly processes: readonly (GpuProcess & { readonly usedMib: number })[];
  readonly throttle: readonly ThrottleReason[];
  readonly throttledUs: number;
  readonly recoveryAction: string;
  readonly lost: "fields" | undefined;
  readonly resetRequired: boolean;
  readonly ecc: {
    readonly dramCorrected: number;
    readonly dramUncorrected: number;
    readonly sramCorrected: number;
    readonly sramUncorrected: number;
    readonly sramThresholdExceeded: boolean;
  };
  readonly remapped: {
    readonly correctable: number;
    readonly uncorrectable: number;
    readonly pending: boolean;
    readonly failure: boolean;
  };
}

/** -1 to 1, the same for the same arguments (an integer hash after Wang). */
function noise(seed: number, gpu: number, what: number, second: number): number {
  let h = (seed * 73_856_093) ^ (gpu * 19_349_663) ^ (what * 83_492_791) ^ (second * 2_654_435_761);
  h = Math.imul(h ^ (h >>> 16), 0x45d9f3b);
  h = Math.imul(h ^ (h >>> 16), 0x45d9f3b);
  h ^= h >>> 16;
  return (h >>> 0) / 0x7fffffff - 1;
}

function approach(from: number, to: number, elapsedMs: number, lagMs: number): number {
  return to + (from - to) * Math.exp(-elapsedMs / lagMs);
}

function targets(
  model: GpuModel,
  processes: readonly GpuProcess[],
): { utilization: number; power: number; temperature: number } {
  const utilization = Math.min(
    100,
    processes.reduce((sum, process) => sum + process.utilization, 0),
  );
  const share = (utilization / 100) ** 0.9;
  return {
    utilization,
    power: model.powerIdleWatts + (model.powerLimitWatts * 0.92 - model.powerIdleWatts) * share,
    temperature: model.temperatureIdle + (model.temperatureLoad - model.temperatureIdle) * share,
  };
}

function rampedMib(process: GpuProcess, atMs: number, speed: number): number {
  const share = Math.min(1, Math.max(0.1, ((atMs - process.sinceMs) * speed) / memoryRampMs));
  return Math.round(process.memoryMib * share);
}

/** The values at `atMs`, to be the next anchor when the processes change. */
function anchorAt(server: ServerDescription, state: GpuState, atMs: number, leavingMib = 0): GpuAnchor {
  const model = models[server.model];
  const target = targets(model, state.processes);
  const elapsed = Math.max(0, atMs - state.anchor.atMs) * server.speed;
  const left = state.anchor.leavingMib * Math.exp(-elapsed / leavingMemoryLagMs);
  return {
    atMs,
    utilization: approach(state.anchor.utilization, target.utilization, elapsed, utilizationLagMs),
    powerWatts: approach(state.anchor.powerWatts, target.power, elapsed, powerLagMs),
    temperature: approach(state.anchor.temperature, target.temperature, elapsed, temperatureLagMs),
    leavingMib: (left < 8 ? 0 : left) + leavingMib,
  };
}

/** The state of a GPU after its processes were changed at `atMs`. */
export function withProcesses(
  server: ServerDescription,
  state: GpuState,
  processes: readonly GpuProcess[],
  atMs: number,
): GpuState {
  const kept = new Set(processes.map((process) => process.pid));
  const leaving = state.processes
    .filter((process) => !kept.has(process.pid))
    .reduce((sum, process) => sum + rampedMib(process, atMs, server.speed), 0);
  return { anchor: anchorAt(server, state, atMs, leaving), processes };
}

/**
 * Reads the state and drops processes that have ended, writing that down so that the way back to idle starts
 * once. When the lock cannot be had the state as read is used: a reading is worth more than a write.
 */
export function readLiveState(dir: string, server: ServerDescription, atMs: number): ServerState {
  const drop = (state: ServerState): ServerState => ({
    ...state,
    gpus: state.gpus.map((gpu) => {
      const alive = gpu.processes.filter(isAlive);
      return alive.length === gpu.processes.length ? gpu : withProcesses(server, gpu, alive, atMs);
    }),
  });
  const state = readState(dir);
  if (state.gpus.every((gpu) => gpu.processes.every(isAlive))) return state;
  try {
    return withLock(dir, () => {
      const next = drop(readState(dir));
      writeJson(paths.state(dir), next);
      return next;
    });
  } catch {
    return drop(state);
  }
}

function throttleOf(
  faults: readonly Fault[],
  identity: GpuIdentity,
  atMs: number,
): { reasons: readonly ThrottleReason[]; us: number } {
  const fault = findFault(faults, "throttle", identity);
  if (!fault) return { reasons: [], us: 0 };
  return { reasons: fault.reasons, us: Math.max(0, atMs - (fault.since_ms ?? atMs)) * 1000 };
}

export function readGpu(
  server: ServerDescription,
  state: ServerState,
  faults: readonly Fault[],
  identity: GpuIdentity,
  atMs: number,
): GpuReading {
  const model = models[server.model];
  const gpu = state.gpus[identity.index];
  if (!gpu) throw new Error(`the state has no GPU ${identity.index}`);
  const now = anchorAt(server, gpu, atMs);
  const second = Math.floor(atMs / 1000);
  const wobble = (what: number, size: number): number =>
    noise(server.seed, identity.index, what, second) * size;
  const throttle = throttleOf(faults, identity, atMs);
  const slowed = throttle.reasons.some(
    (reason) => reason !== "applications_clocks_setting" && reason !== "sync_boost",
  );

  const busy = now.utilization >= 0.5;
  const utilization = busy ? Math.max(0, Math.min(100, Math.round(now.utilization + wobble(1, 2)))) : 0;
  const power = Math.min(
    model.powerLimitWatts,
    Math.max(
      model.powerIdleWatts * 0.9,
      now.powerWatts * (slowed && busy ? 0.6 : 1) + wobble(2, 1 + now.utilization / 20),
    ),
  );
  const overheat = findFault(faults, "overheat", identity);
  const temperature = Math.round(overheat?.temperature_celsius ?? now.temperature + wobble(3, 0.8));

  const processes = gpu.processes.map((process) => ({
    ...process,
    usedMib: rampedMib(process, atMs, server.speed),
  }));
  const dirty = findFault(faults, "dirty", identity);
  const room = model.memoryTotalMib - model.memoryReservedMib;
  const used = Math.min(
    room,
    Math.round(
      now.leavingMib +
        (dirty?.memory_mib ?? 0) +
        processes.reduce((sum, process) => sum + process.usedMib, 0),
    ),
  );
  const clock = busy ? model.clockMaximum * (slowed ? 0.5 : 1) : model.clockIdle;
  const ecc = findFault(faults, "ecc", identity);
  const remapped = findFault(faults, "remapped-rows", identity);
  const resetRequired = findFault(faults, "reset-required", identity) !== undefined;
  return {
    identity,
    model,
    atMs,
    utilization,
    memoryUtilization: Math.round(utilization * 0.55),
    memoryUsedMib: used,
    memoryFreeMib: room - used + 1,
    powerAverageWatts: power,
    powerInstantWatts: Math.min(model.powerLimitWatts, power * (1 + wobble(4, 0.01))),
    temperature,
    memoryTemperature: temperature + 6,
    graphicsClock: Math.round(clock / model.clockStep) * model.clockStep,
    videoClock: busy ? model.videoClockMaximum : model.videoClockIdle,
    performanceState: busy || processes.length > 0 ? "P0" : model.idlePerformanceState,
    processes,
    throttle: throttle.reasons,
    throttledUs: throttle.us,
    recoveryAction:
      findFault(faults, "recovery-action", identity)?.action ?? (resetRequired ? "Reset" : "None"),
    lost: findFault(faults, "lost", identity)?.form === "fields" ? "fields" : undefined,
    resetRequired,
    ecc: {
      dramCorrected: ecc?.dram_corrected ?? 0,
      dramUncorrected: ecc?.dram_uncorrected ?? 0,
      sramCorrected: ecc?.sram_corrected ?? 0,
      sramUncorrected: ecc?.sram_uncorrected ?? 0,
      sramThresholdExceeded: ecc?.sram_threshold_exceeded ?? false,
    },
    remapped: {
      correctable: remapped?.correctable ?? 0,
      uncorrectable: remapped?.uncorrectable ?? 0,
      pending: remapped?.pending ?? false,
      failure: remapped?.failure ?? false,
    },
  };
}
