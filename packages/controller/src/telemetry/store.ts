import type { GpuSample } from "@palebluedot/shared/generated/palebluedot/agent/v1/agent.ts";
import type { TelemetryStore } from "./types.ts";

/**
 * One ring of samples per GPU, packed in slabs outside the JavaScript heap: a sample is one record of
 * 72 bytes, whatever it tells, and appending allocates nothing. 60 samples (ten minutes at 10 s) are
 * 4,320 bytes a GPU, 346 MB for 80,000.
 *
 * A record, in 4-byte words:
 *   0-1  time (float64, ms)          2-3  memory used (float64, bytes)
 *   4    which fields are present    5    clock event reasons (low 32 bits: all that are defined)
 *   6-7  ECC counters (saturating)   8-16 nine float32
 *   17   PCIe generation, PCIe width, performance state (one byte each)
 */
const words = 18;
const recordBytes = words * 4;
const gpusPerSlab = 256;

/** Fields kept as float32, in the order of their words. */
const floats = [
  "utilizationRatio",
  "memoryUtilizationRatio",
  "temperatureCelsius",
  "memoryTemperatureCelsius",
  "powerDrawWatts",
  "powerLimitWatts",
  "fanSpeedRatio",
  "smClockMhz",
  "memoryClockMhz",
] as const;
const firstFloat = 8;
// Presence bits: the floats have 0..8, these follow.
const hasMemoryUsed = 1 << 9;
const hasReasons = 1 << 10;
const hasEccCorrected = 1 << 11;
const hasEccUncorrected = 1 << 12;
const hasPcieGeneration = 1 << 13;
const hasPcieWidth = 1 << 14;
const hasPerformanceState = 1 << 15;

const maxUint32 = 0xffff_ffff;

interface Slab {
  readonly floats64: Float64Array;
  readonly floats32: Float32Array;
  readonly uints: Uint32Array;
  readonly bytes: Uint8Array;
}

interface Ring {
  readonly slot: number;
  readonly serverId: string;
  /** Where the next sample goes. */
  next: number;
  filled: number;
  lastTimeMs: number;
}

export interface TelemetryOptions {
  readonly samplesPerGpu?: number;
  /** GPUs beyond this many are not kept (and counted in `dropped`). */
  readonly maxGpus?: number;
}

export interface TelemetryStatistics {
  readonly gpus: number;
  readonly bytes: number;
  readonly appended: number;
  /** Samples of GPUs that found no place, that belong to another server, or that are older than the newest. */
  readonly dropped: number;
}

export interface BoundedTelemetryStore extends TelemetryStore {
  readonly bytesPerGpu: number;
  statistics(): TelemetryStatistics;
}

export function createTelemetryStore(options: TelemetryOptions = {}): BoundedTelemetryStore {
  const samplesPerGpu = options.samplesPerGpu ?? 60;
  const maxGpus = options.maxGpus ?? 100_000;
  const ringWords = samplesPerGpu * words;
  const slabs: Slab[] = [];
  const rings = new Map<string, Ring>();
  const freeSlots: number[] = [];
  let slots = 0;
  let appended = 0;
  let dropped = 0;

  function takeSlot(): number | undefined {
    const free = freeSlots.pop();
    if (free !== undefined) return free;
    if (slots >= maxGpus) return undefined;
    if (slots % gpusPerSlab === 0) {
      const buffer = new ArrayBuffer(gpusPerSlab * ringWords * 4);
      slabs.push({
        floats64: new Float64Array(buffer),
        floats32: new Float32Array(buffer),
        uints: new Uint32Array(buffer),
        bytes: new Uint8Array(buffer),
      });
    }
    slots += 1;
    return slots - 1;
  }

  function drop(gpuUuid: string, ring: Ring | undefined): void {
    if (ring === undefined) return;
    rings.delete(gpuUuid);
    freeSlots.push(ring.slot);
  }

  function ringFor(serverId: string, gpuUuid: string): Ring | undefined {
    const known = rings.get(gpuUuid);
    if (known !== undefined) {
      if (known.serverId === serverId) return known;
      // The GPU moved: the session layer lets a server report only GPUs that the database gives it.
      drop(gpuUuid, known);
    }
    const slot = takeSlot();
    if (slot === undefined) return undefined;
    const ring: Ring = { slot, serverId, next: 0, filled: 0, lastTimeMs: 0 };
    rings.set(gpuUuid, ring);
    return ring;
  }

  function read(gpuUuid: string, ring: Ring, index: number): GpuSample {
    const slab = slabs[Math.floor(ring.slot / gpusPerSlab)]!;
    const at = (ring.slot % gpusPerSlab) * ringWords + index * words;
    const present = slab.uints[at + 4]!;
    const float = (field: number): number | undefined =>
      (present & (1 << field)) === 0 ? undefined : slab.floats32[at + firstFloat + field];
    const when = (bit: number, value: number | undefined): number | undefined =>
      (present & bit) === 0 ? undefined : value;
    const byte = (at + 17) * 4;
    const state = when(hasPerformanceState, slab.bytes[byte + 2]);
    return {
      gpuUuid,
      timeUnixMs: slab.floats64[at >> 1]!,
      utilizationRatio: float(0),
      memoryUtilizationRatio: float(1),
      memoryUsedBytes: when(hasMemoryUsed, slab.floats64[(at + 2) >> 1]),
      temperatureCelsius: float(2),
      memoryTemperatureCelsius: float(3),
      powerDrawWatts: float(4),
      powerLimitWatts: float(5),
      smClockMhz: float(7),
      memoryClockMhz: float(8),
      pcieGeneration: when(hasPcieGeneration, slab.bytes[byte]),
      pcieWidth: when(hasPcieWidth, slab.bytes[byte + 1]),
      clockEventReasons: when(hasReasons, slab.uints[at + 5]),
      eccCorrectedVolatile: when(hasEccCorrected, slab.uints[at + 6]),
      eccUncorrectedVolatile: when(hasEccUncorrected, slab.uints[at + 7]),
      fanSpeedRatio: float(6),
      performanceState: state === undefined ? undefined : `P${state}`,
    };
  }

  function write(slab: Slab, at: number, sample: GpuSample): void {
    let present = 0;
    for (let field = 0; field < floats.length; field += 1) {
      const value = sample[floats[field]!];
      if (value === undefined) continue;
      slab.floats32[at + firstFloat + field] = value;
      present |= 1 << field;
    }
    slab.floats64[at >> 1] = sample.timeUnixMs;
    if (sample.memoryUsedBytes !== undefined) {
      slab.floats64[(at + 2) >> 1] = sample.memoryUsedBytes;
      present |= hasMemoryUsed;
    }
    if (sample.clockEventReasons !== undefined) {
      slab.uints[at + 5] = sample.clockEventReasons % 0x1_0000_0000;
      present |= hasReasons;
    }
    if (sample.eccCorrectedVolatile !== undefined) {
      slab.uints[at + 6] = Math.min(maxUint32, sample.eccCorrectedVolatile);
      present |= hasEccCorrected;
    }
    if (sample.eccUncorrectedVolatile !== undefined) {
      slab.uints[at + 7] = Math.min(maxUint32, sample.eccUncorrectedVolatile);
      present |= hasEccUncorrected;
    }
    const byte = (at + 17) * 4;
    if (sample.pcieGeneration !== undefined) {
      slab.bytes[byte] = sample.pcieGeneration;
      present |= hasPcieGeneration;
    }
    if (sample.pcieWidth !== undefined) {
      slab.bytes[byte + 1] = sample.pcieWidth;
      present |= hasPcieWidth;
    }
    const state = performanceState(sample.performanceState);
    if (state !== undefined) {
      slab.bytes[byte + 2] = state;
      present |= hasPerformanceState;
    }
    slab.uints[at + 4] = present;
  }

  return {
    bytesPerGpu: samplesPerGpu * recordBytes,

    append(serverId, samples) {
      for (const sample of samples) {
        const ring = ringFor(serverId, sample.gpuUuid);
        // An agent's clock may jump back; the ring stays in order, and moves on once the clock caught up.
        if (ring === undefined || sample.timeUnixMs <= ring.lastTimeMs) {
          dropped += 1;
          continue;
        }
        const slab = slabs[Math.floor(ring.slot / gpusPerSlab)]!;
        write(slab, (ring.slot % gpusPerSlab) * ringWords + ring.next * words, sample);
        ring.lastTimeMs = sample.timeUnixMs;
        ring.next = (ring.next + 1) % samplesPerGpu;
        ring.filled = Math.min(samplesPerGpu, ring.filled + 1);
        appended += 1;
      }
    },

    window(gpuUuid, sinceUnixMs) {
      const ring = rings.get(gpuUuid);
      if (ring === undefined) return [];
      const found: GpuSample[] = [];
      for (let age = ring.filled; age >= 1; age -= 1) {
        const sample = read(gpuUuid, ring, (ring.next - age + samplesPerGpu) % samplesPerGpu);
        if (sample.timeUnixMs >= sinceUnixMs) found.push(sample);
      }
      return found;
    },

    latest(gpuUuid) {
      const ring = rings.get(gpuUuid);
      if (ring === undefined || ring.filled === 0) return undefined;
      return read(gpuUuid, ring, (ring.next - 1 + samplesPerGpu) % samplesPerGpu);
    },

    forget(gpuUuid) {
      drop(gpuUuid, rings.get(gpuUuid));
    },

    forgetOlderThan(timeUnixMs) {
      let forgotten = 0;
      for (const [gpuUuid, ring] of rings) {
        if (ring.lastTimeMs >= timeUnixMs) continue;
        drop(gpuUuid, ring);
        forgotten += 1;
      }
      return forgotten;
    },

    statistics: () => ({
      gpus: rings.size,
      bytes: slabs.length * gpusPerSlab * samplesPerGpu * recordBytes,
      appended,
      dropped,
    }),
  };
}

/** "P0".."P15" as a number; anything else is not kept. */
function performanceState(text: string | undefined): number | undefined {
  if (text === undefined || text.length < 2 || text.length > 3 || text.charCodeAt(0) !== 80) return undefined;
  const state = Number(text.slice(1));
  return Number.isInteger(state) && state >= 0 && state <= 15 ? state : undefined;
}
