import * as fc from "fast-check";
import { expect, test } from "vitest";
import { GpuInventory, GpuSample } from "@palebluedot/shared/generated/palebluedot/agent/v1/agent.ts";
import { parseCsvRow } from "./csv.ts";
import { toInventory, toSample } from "./reading.ts";
import { parseSmiXml } from "./xml.ts";

const uuid = "GPU-6f5e0b1c-1f3a-4a0e-9d1e-2f1f4b6c8d10";
const numericFields = [
  "index",
  "memory.total",
  "memory.used",
  "utilization.gpu",
  "temperature.gpu",
  "power.draw",
  "power.limit",
  "power.max_limit",
  "clocks.current.sm",
  "clocks.current.memory",
  "fan.speed",
  "pcie.link.gen.current",
  "pcie.link.gen.max",
  "pcie.link.width.current",
  "pcie.link.width.max",
  "clocks_event_reasons.active",
  "ecc.errors.corrected.volatile.total",
  "ecc.errors.uncorrected.volatile.total",
] as const;

test("fractions become whole numbers where the wire has integers", () => {
  const fields = ["index", "uuid", "memory.used", "memory.total", "clocks.current.sm"];
  const reading = parseCsvRow(fields, `0, ${uuid}, 19818.3 MiB, 81559.123456789 MiB, 1754.6 MHz`) ?? {};
  const sample = GpuSample.decode(GpuSample.encode(toSample(reading, uuid, 1_700_000_000_000.25)).finish());
  expect(sample.memoryUsedBytes).toBe(Math.round(19_818.3 * 1024 ** 2));
  expect(sample.smClockMhz).toBe(1755);
  expect(sample.timeUnixMs).toBe(1_700_000_000_000);
  const inventory = toInventory(reading);
  if (inventory === undefined) throw new Error("no inventory");
  expect(GpuInventory.decode(GpuInventory.encode(inventory).finish()).memoryTotalBytes).toBe(
    Math.round(81_559.123456789 * 1024 ** 2),
  );
});

test("the document's fractions are whole numbers too", () => {
  const { gpus } = parseSmiXml(`<?xml version="1.0" ?>
    <nvidia_smi_log><driver_version>580.95.05</driver_version><attached_gpus>1</attached_gpus>
    <gpu id="00000000:18:00.0"><uuid>${uuid}</uuid><minor_number>0</minor_number>
    <fb_memory_usage><total>81559.5 MiB</total><used>0.3 MiB</used></fb_memory_usage>
    <clocks><sm_clock>345.5 MHz</sm_clock></clocks></gpu></nvidia_smi_log>`);
  expect(gpus[0]).toMatchObject({
    memoryTotalBytes: 81_559.5 * 1024 ** 2,
    memoryUsedBytes: Math.round(0.3 * 1024 ** 2),
    smClockMhz: 346,
  });
});

test("whatever a driver prints can be encoded", () => {
  const number = fc.oneof(
    fc.double({ noNaN: false }).map(String),
    fc.bigInt({ min: -(2n ** 70n), max: 2n ** 70n }).map(String),
    fc.integer({ min: -5, max: 10 }).map(String),
    fc.tuple(fc.nat(), fc.nat()).map(([whole, fraction]) => `${whole}.${fraction}`),
    fc.constantFrom("4294967295", "4294967296", "9007199254740991", "9007199254740993", "0xffffffffffffffff"),
    fc.string(),
  );
  const unit = fc.constantFrom("", " MiB", " GiB", " MHz", " %", " W", "x");
  const value = fc
    .tuple(number, unit)
    .map(([text, suffix]) => `${text}${suffix}`.replaceAll(/[,\n\r]/g, " "));
  const row = fc.array(value, { minLength: numericFields.length, maxLength: numericFields.length });
  fc.assert(
    fc.property(row, fc.double({ min: 0, max: 2e12, noNaN: true }), (values, timeUnixMs) => {
      const reading = { ...parseCsvRow(numericFields, values.join(",")), uuid };
      expect(() => GpuSample.encode(toSample(reading, uuid, timeUnixMs)).finish()).not.toThrow();
      const inventory = toInventory(reading);
      if (inventory !== undefined) expect(() => GpuInventory.encode(inventory).finish()).not.toThrow();
    }),
    { numRuns: 2000 },
  );
});
