import { expect, test } from "vitest";
import { GpuSample } from "@palebluedot/shared/generated/palebluedot/agent/v1/agent.ts";
import { createTelemetryStore } from "./store.ts";

const full: GpuSample = {
  gpuUuid: "GPU-a",
  timeUnixMs: 1_700_000_000_123,
  utilizationRatio: 0.5,
  memoryUtilizationRatio: 0.25,
  memoryUsedBytes: 301_234_567_890,
  temperatureCelsius: 61,
  memoryTemperatureCelsius: 70,
  powerDrawWatts: 350.5,
  powerLimitWatts: 700,
  smClockMhz: 1980,
  memoryClockMhz: 2619,
  pcieGeneration: 5,
  pcieWidth: 16,
  clockEventReasons: 4,
  eccCorrectedVolatile: 3,
  eccUncorrectedVolatile: 0,
  fanSpeedRatio: 0.75,
  performanceState: "P0",
};

const bare = (gpuUuid: string, timeUnixMs: number): GpuSample => ({
  ...GpuSample.decode(new Uint8Array()),
  gpuUuid,
  timeUnixMs,
});

test("a full sample and an empty one come back as they went in", () => {
  const store = createTelemetryStore();
  store.append("s", [full, bare("GPU-b", 5)]);
  expect(store.latest("GPU-a")).toEqual(full);
  // Absent is not zero.
  expect(store.latest("GPU-b")).toEqual(bare("GPU-b", 5));
});

test("the ring keeps the newest samples in order", () => {
  const store = createTelemetryStore({ samplesPerGpu: 4 });
  for (let time = 1; time <= 10; time += 1) store.append("s", [bare("GPU-a", time)]);
  expect(store.window("GPU-a", 0).map((sample) => sample.timeUnixMs)).toEqual([7, 8, 9, 10]);
  expect(store.window("GPU-a", 9).map((sample) => sample.timeUnixMs)).toEqual([9, 10]);
  store.append("s", [bare("GPU-a", 3)]);
  expect(store.latest("GPU-a")?.timeUnixMs).toBe(10);
});

test("memory is bounded: a GPU too many is dropped, a forgotten one makes place", () => {
  const store = createTelemetryStore({ samplesPerGpu: 4, maxGpus: 2 });
  store.append("s", [bare("GPU-a", 1), bare("GPU-b", 1), bare("GPU-c", 1)]);
  expect(store.latest("GPU-c")).toBeUndefined();
  expect(store.statistics()).toMatchObject({ gpus: 2, appended: 2, dropped: 1 });
  store.forget("GPU-a");
  store.append("s", [bare("GPU-c", 2)]);
  expect(store.latest("GPU-c")?.timeUnixMs).toBe(2);
  expect(store.latest("GPU-a")).toBeUndefined();
});

test("rings that nobody feeds any more make place", () => {
  const store = createTelemetryStore({ samplesPerGpu: 4, maxGpus: 2 });
  store.append("s", [bare("GPU-a", 1000), bare("GPU-b", 2000)]);
  expect(store.forgetOlderThan(2000)).toBe(1);
  expect(store.latest("GPU-a")).toBeUndefined();
  expect(store.latest("GPU-b")?.timeUnixMs).toBe(2000);
  store.append("s", [bare("GPU-c", 1)]);
  expect(store.latest("GPU-c")?.timeUnixMs).toBe(1);
  expect(store.statistics()).toMatchObject({ gpus: 2, dropped: 0 });
});

test("a GPU that moved to another server starts anew", () => {
  const store = createTelemetryStore();
  store.append("s", [full]);
  store.append("t", [bare("GPU-a", 1)]);
  expect(store.window("GPU-a", 0)).toEqual([bare("GPU-a", 1)]);
});
