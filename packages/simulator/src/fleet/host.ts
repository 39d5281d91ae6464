import { createHash } from "node:crypto";
import {
  Condition_Status,
  GpuInventory,
  HostInventory,
  type GpuSample,
  type Inventory,
} from "@palebluedot/shared/generated/palebluedot/agent/v1/agent.ts";

/** One host of a simulated fleet; everything about it follows from these. */
export interface SimulatedHost {
  readonly seed: number;
  readonly index: number;
  readonly gpus: number;
  readonly model: string;
}

const memoryBytes = 81_559 * 1024 * 1024;

function digest(host: SimulatedHost, what: string): string {
  return createHash("sha256").update(`palebluedot-fleet:${host.seed}:${host.index}:${what}`).digest("hex");
}

function uuid(hex: string): string {
  return `${hex.slice(0, 8)}-${hex.slice(8, 12)}-4${hex.slice(13, 16)}-a${hex.slice(17, 20)}-${hex.slice(20, 32)}`;
}

function gpuUuid(host: SimulatedHost, gpu: number): string {
  return `GPU-${uuid(digest(host, `gpu:${gpu}`))}`;
}

/** The same at every call, so that a reconnect finds it unchanged. */
export function simulatedInventory(host: SimulatedHost): Inventory {
  const hex = digest(host, "host");
  const mac = `02:${(hex.slice(0, 10).match(/../g) ?? []).join(":")}`;
  return {
    host: {
      ...HostInventory.decode(new Uint8Array()),
      hostname: `fleet-${host.seed}-${host.index}`,
      osName: "Simulated",
      architecture: "x86_64",
      cpuModel: "Simulated CPU",
      cpuSockets: 2,
      cpuCores: 96,
      cpuThreads: 192,
      memoryTotalBytes: 2 ** 40,
      networkInterfaces: [{ name: "eth0", mac, addresses: [], speedMbps: 100_000, operationalState: "up" }],
      smbiosUuid: uuid(hex),
      serial: `FLT${hex.slice(0, 12).toUpperCase()}`,
      manufacturer: "Palebluedot",
      product: "Fleet simulator",
      containerEngine: {
        name: "palebluedot-fleet",
        version: "1",
        apiVersion: "1",
        gpuMode: "device-nodes",
        simulated: true,
      },
    },
    gpus: Array.from({ length: host.gpus }, (_unused, index) => ({
      ...GpuInventory.decode(new Uint8Array()),
      uuid: gpuUuid(host, index),
      index,
      model: host.model,
      pciBusId: `00000000:${(0x10 + index * 8).toString(16).toUpperCase().padStart(2, "0")}:00.0`,
      memoryTotalBytes: memoryBytes,
      minorNumber: index,
      migCapable: true,
      migEnabled: false,
      driverVersion: "580.95.05",
    })),
    conditions: [
      {
        component: "gpu-driver",
        status: Condition_Status.OK,
        reason: "",
        message: "",
        sinceUnixMs: 0,
      },
    ],
  };
}

const uuids = new WeakMap<SimulatedHost, readonly string[]>();

export function simulatedSamples(host: SimulatedHost, timeUnixMs: number, busy: boolean): GpuSample[] {
  let names = uuids.get(host);
  if (names === undefined) {
    names = Array.from({ length: host.gpus }, (_unused, index) => gpuUuid(host, index));
    uuids.set(host, names);
  }
  return names.map((name) => ({
    gpuUuid: name,
    timeUnixMs,
    utilizationRatio: busy ? 0.9 + Math.random() * 0.1 : 0,
    memoryUtilizationRatio: busy ? 0.5 : 0,
    memoryUsedBytes: busy ? Math.floor(memoryBytes * 0.8) : 600 * 1024 * 1024,
    temperatureCelsius: busy ? 65 : 31,
    memoryTemperatureCelsius: busy ? 75 : 38,
    powerDrawWatts: busy ? 650 : 72,
    powerLimitWatts: 700,
    smClockMhz: busy ? 1980 : 345,
    memoryClockMhz: 2619,
    pcieGeneration: 5,
    pcieWidth: 16,
    clockEventReasons: busy ? 4 : 1,
    eccCorrectedVolatile: 0,
    eccUncorrectedVolatile: 0,
    fanSpeedRatio: undefined,
    performanceState: "P0",
  }));
}
