import type { GpuInventory, GpuSample } from "@palebluedot/shared/generated/palebluedot/agent/v1/agent.ts";
import { uint32, uint64 } from "./values.ts";

/**
 * Everything that nvidia-smi told about one GPU at one moment, whatever the output form and the driver's
 * generation. Undefined: not told. Sample, inventory, metrics and `inspect` are all made from this.
 */
export interface GpuReading {
  index?: number | undefined;
  uuid?: string | undefined;
  model?: string | undefined;
  serial?: string | undefined;
  /** 00000000:18:00.0 */
  pciBusId?: string | undefined;
  driverVersion?: string | undefined;
  cudaVersion?: string | undefined;
  vbiosVersion?: string | undefined;
  architecture?: string | undefined;
  minorNumber?: number | undefined;
  persistenceMode?: boolean | undefined;
  memoryTotalBytes?: number | undefined;
  memoryReservedBytes?: number | undefined;
  memoryUsedBytes?: number | undefined;
  memoryFreeBytes?: number | undefined;
  temperatureCelsius?: number | undefined;
  memoryTemperatureCelsius?: number | undefined;
  powerDrawWatts?: number | undefined;
  powerLimitWatts?: number | undefined;
  powerLimitMaxWatts?: number | undefined;
  utilizationRatio?: number | undefined;
  memoryUtilizationRatio?: number | undefined;
  encoderUtilizationRatio?: number | undefined;
  decoderUtilizationRatio?: number | undefined;
  smClockMhz?: number | undefined;
  memoryClockMhz?: number | undefined;
  fanSpeedRatio?: number | undefined;
  performanceState?: string | undefined;
  pcieGeneration?: number | undefined;
  pcieWidth?: number | undefined;
  pcieGenerationMax?: number | undefined;
  pcieWidthMax?: number | undefined;
  pcieReplayCount?: number | undefined;
  /** Bit mask as in clocks_event_reasons.active. */
  clockEventReasons?: number | undefined;
  eccModeCurrent?: boolean | undefined;
  eccModePending?: boolean | undefined;
  eccCorrectedVolatile?: number | undefined;
  eccUncorrectedVolatile?: number | undefined;
  eccCorrectedAggregate?: number | undefined;
  eccUncorrectedAggregate?: number | undefined;
  eccSramThresholdExceeded?: boolean | undefined;
  channelRepairPending?: boolean | undefined;
  tpcRepairPending?: boolean | undefined;
  unrepairableMemory?: boolean | undefined;
  remappedRowsCorrectable?: number | undefined;
  remappedRowsUncorrectable?: number | undefined;
  remappedRowsPending?: boolean | undefined;
  remappedRowsFailure?: boolean | undefined;
  retiredPagesPending?: boolean | undefined;
  /** In nvidia-smi's words: "None", "Reset", "Reboot", "Drain P2P", "Drain and Reset". */
  recoveryAction?: string | undefined;
  resetRequired?: boolean | undefined;
  drainAndResetRecommended?: boolean | undefined;
  /** In nvidia-smi's words: "Enabled" or "Disabled". */
  migMode?: string | undefined;
  migPending?: string | undefined;
  /** Undefined when the document has no such section; empty when it says there are none. */
  migDevices?: MigReading[] | undefined;
  /** Undefined when the document has no such section. */
  processes?: ProcessReading[] | undefined;
  /** A field said "GPU is lost". */
  lost?: boolean | undefined;
  /** A field said "GPU requires reset". */
  requiresReset?: boolean | undefined;
}

export interface MigReading {
  index: number;
  gpuInstanceId?: number | undefined;
  computeInstanceId?: number | undefined;
  memoryTotalBytes?: number | undefined;
  memoryUsedBytes?: number | undefined;
  multiprocessorCount?: number | undefined;
  /** From `-L`, joined by index; the XML document does not hold it. */
  uuid?: string | undefined;
  profile?: string | undefined;
}

export interface ProcessReading {
  pid: number;
  /** "C" compute, "G" graphics, "C+G" both. */
  type?: string | undefined;
  name: string;
  memoryUsedBytes?: number | undefined;
}

/** Names of the bits of clocks_event_reasons.active, as nvidia-smi's own field names end. */
export const clockEventReasonBits: readonly (readonly [name: string, bit: number])[] = [
  ["gpu_idle", 0x1],
  ["applications_clocks_setting", 0x2],
  ["sw_power_cap", 0x4],
  ["hw_slowdown", 0x8],
  ["sync_boost", 0x10],
  ["sw_thermal_slowdown", 0x20],
  ["hw_thermal_slowdown", 0x40],
  ["hw_power_brake_slowdown", 0x80],
  ["display_clocks_setting", 0x100],
];

/** Names of the active reasons; a bit without a name appears as "bit_9". */
export function clockEventReasonNames(mask: number): string[] {
  const names: string[] = [];
  for (let bit = 0; bit < 53; bit += 1) {
    const value = 2 ** bit;
    if (Math.floor(mask / value) % 2 === 0) continue;
    names.push(clockEventReasonBits.find(([, known]) => known === value)?.[0] ?? `bit_${String(bit)}`);
  }
  return names;
}

/** Integers of the wire are made whole and bounded here: one odd reading must not cost the whole message. */
export function toSample(reading: GpuReading, uuid: string, timeUnixMs: number): GpuSample {
  return {
    gpuUuid: uuid,
    timeUnixMs: Math.round(timeUnixMs),
    utilizationRatio: reading.utilizationRatio,
    memoryUtilizationRatio: reading.memoryUtilizationRatio,
    memoryUsedBytes: uint64(reading.memoryUsedBytes),
    temperatureCelsius: reading.temperatureCelsius,
    memoryTemperatureCelsius: reading.memoryTemperatureCelsius,
    powerDrawWatts: reading.powerDrawWatts,
    powerLimitWatts: reading.powerLimitWatts,
    smClockMhz: uint32(reading.smClockMhz),
    memoryClockMhz: uint32(reading.memoryClockMhz),
    pcieGeneration: uint32(reading.pcieGeneration),
    pcieWidth: uint32(reading.pcieWidth),
    clockEventReasons: uint64(reading.clockEventReasons),
    eccCorrectedVolatile: uint64(reading.eccCorrectedVolatile),
    eccUncorrectedVolatile: uint64(reading.eccUncorrectedVolatile),
    fanSpeedRatio: reading.fanSpeedRatio,
    performanceState: reading.performanceState,
  };
}

/** What else than nvidia-smi's own document an inventory entry needs. */
export interface PlacementFacts {
  readonly numaNode?: number | undefined;
  readonly nvlinkCount?: number | undefined;
  readonly nvlinkPeers?: readonly string[] | undefined;
}

/** Undefined when the reading lacks what names a GPU: UUID and index. */
export function toInventory(reading: GpuReading, placement: PlacementFacts = {}): GpuInventory | undefined {
  const { uuid } = reading;
  const index = uint32(reading.index);
  if (uuid === undefined || index === undefined) return undefined;
  return {
    uuid,
    index,
    model: reading.model ?? "",
    serial: reading.serial,
    pciBusId: reading.pciBusId ?? "",
    driverVersion: reading.driverVersion,
    cudaVersion: reading.cudaVersion,
    vbiosVersion: reading.vbiosVersion,
    memoryTotalBytes: uint64(reading.memoryTotalBytes),
    numaNode: placement.numaNode,
    architecture: reading.architecture,
    minorNumber: uint32(reading.minorNumber),
    // The driver knows MIG (it has the section), but this GPU has no MIG mode: not capable.
    migCapable: reading.migMode !== undefined ? true : reading.migDevices !== undefined ? false : undefined,
    migEnabled: reading.migMode === undefined ? undefined : reading.migMode === "Enabled",
    migPendingEnabled: reading.migPending === undefined ? undefined : reading.migPending === "Enabled",
    nvlinkCount: uint32(placement.nvlinkCount),
    nvlinkPeers: [...(placement.nvlinkPeers ?? [])],
    migDevices: (reading.migDevices ?? []).map((device) => ({
      index: uint32(device.index) ?? 0,
      uuid: device.uuid ?? "",
      gpuInstanceId: uint32(device.gpuInstanceId) ?? 0,
      computeInstanceId: uint32(device.computeInstanceId) ?? 0,
      profile: device.profile ?? "",
      memoryTotalBytes: uint64(device.memoryTotalBytes),
    })),
    powerLimitMaxWatts: reading.powerLimitMaxWatts,
    pcieGenerationMax: uint32(reading.pcieGenerationMax),
    pcieWidthMax: uint32(reading.pcieWidthMax),
  };
}

/** Fast fields win; the document fills in what the fast loop does not ask for. */
export function withSlowFacts(fast: GpuReading, slow: GpuReading | undefined): GpuReading {
  const told = Object.entries(fast).filter(([, value]) => value !== undefined);
  return slow === undefined
    ? fast
    : {
        index: slow.index,
        model: slow.model,
        serial: slow.serial,
        pciBusId: slow.pciBusId,
        driverVersion: slow.driverVersion,
        minorNumber: slow.minorNumber,
        pcieReplayCount: slow.pcieReplayCount,
        remappedRowsCorrectable: slow.remappedRowsCorrectable,
        remappedRowsUncorrectable: slow.remappedRowsUncorrectable,
        remappedRowsFailure: slow.remappedRowsFailure,
        ...Object.fromEntries(told),
      };
}
