import { readdirSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { describe, expect, it } from "vitest";
import { recordingsDir } from "@palebluedot/shared/testing/recordings.ts";
import { parseCsvRow, parseCsvText, parseFieldList } from "./csv.ts";
import { parseComputeApps, parseList, parseTopology } from "./listings.ts";

const mib = 1024 * 1024;
const fields = [
  "index",
  "uuid",
  "name",
  "utilization.gpu",
  "memory.used",
  "temperature.memory",
  "power.draw",
];
const uuid = "GPU-11111111-2222-3333-4444-555555555555";

describe("parseCsvRow", () => {
  it("reads a row without units", () => {
    expect(parseCsvRow(fields, `3, ${uuid}, NVIDIA H100 80GB HBM3, 57, 19818, 54, 631.95`)).toEqual({
      index: 3,
      uuid,
      model: "NVIDIA H100 80GB HBM3",
      utilizationRatio: 0.57,
      memoryUsedBytes: 19818 * mib,
      memoryTemperatureCelsius: 54,
      powerDrawWatts: 631.95,
    });
  });

  it("reads the same row with units", () => {
    const bare = parseCsvRow(fields, `3, ${uuid}, NVIDIA L40S, 57, 19818, 54, 631.95`);
    expect(parseCsvRow(fields, `3, ${uuid}, NVIDIA L40S, 57 %, 19818 MiB, 54, 631.95 W`)).toEqual(bare);
  });

  it.each([
    "[N/A]",
    "N/A",
    "[Not Supported]",
    "[Insufficient Permissions]",
    "[Function Not Found]",
    "[Requested functionality has been deprecated]",
    "[Unknown Error]",
    "",
  ])("takes %j for not told, and never for zero", (form) => {
    const row = parseCsvRow(fields, `0, ${uuid}, NVIDIA T4, ${form}, ${form}, ${form}, ${form}`);
    expect(row).toMatchObject({ index: 0, uuid });
    expect(row?.utilizationRatio).toBeUndefined();
    expect(row?.memoryUsedBytes).toBeUndefined();
    expect(row?.memoryTemperatureCelsius).toBeUndefined();
    expect(row?.powerDrawWatts).toBeUndefined();
    expect(row?.lost).toBeUndefined();
  });

  it.each(["GPU is lost", "[GPU is lost]"])("notices %j", (form) => {
    expect(parseCsvRow(fields, `0, ${form}, ${form}, ${form}, ${form}, ${form}, ${form}`)?.lost).toBe(true);
  });

  it("notices a GPU that requires a reset", () => {
    const row = parseCsvRow(fields, `0, ${uuid}, NVIDIA T4, [GPU requires reset], 0, 0, 0`);
    expect(row).toMatchObject({ requiresReset: true });
    expect(row?.utilizationRatio).toBeUndefined();
  });

  it.each([
    ["half a line", `0, ${uuid}, NVIDIA T4`],
    ["an error message", "Unable to determine the device handle for GPU 0000:18:00.0: GPU is lost."],
    [
      "the header",
      "index, uuid, name, utilization.gpu [%], memory.used [MiB], temperature.memory, power.draw [W]",
    ],
    ["a line that never ends", "x".repeat(100_000)],
  ])("takes %s for no row", (_, line) => {
    expect(parseCsvRow(fields, line)).toBeUndefined();
  });

  it("gives surplus commas to the name", () => {
    expect(parseCsvRow(fields, `0, ${uuid}, NVIDIA X, rev. B, 1, 2, 3, 4`)?.model).toBe("NVIDIA X, rev. B");
  });

  it("believes no ratio outside 0 to 1 and no negative memory", () => {
    const row = parseCsvRow(fields, `0, ${uuid}, T4, 900, -5, 1, 1`);
    expect(row?.utilizationRatio).toBeUndefined();
    expect(row?.memoryUsedBytes).toBeUndefined();
  });

  it("knows the aliases of older drivers", () => {
    const list = parseFieldList("gpu_uuid, gpu_bus_id,clocks.sm,clocks_throttle_reasons.active,power.limit");
    expect(parseCsvRow(list, `${uuid}, 0000:18:00.0, 1980 MHz, 0x0000000000000004, 700.00 W`)).toEqual({
      uuid,
      pciBusId: "00000000:18:00.0",
      smClockMhz: 1980,
      clockEventReasons: 4,
      powerLimitWatts: 700,
    });
  });
});

describe("listings", () => {
  it("joins MIG devices to their GPU in -L", () => {
    const [first, second] = parseList(
      `GPU 0: NVIDIA H100 80GB HBM3 (UUID: ${uuid})\n` +
        "  MIG 3g.40gb     Device  0: (UUID: MIG-aaaaaaaa-0000-5000-8000-000000000001)\n" +
        "  MIG 1g.10gb     Device  1: (UUID: MIG-aaaaaaaa-0000-5000-8000-000000000002)\n" +
        "GPU 1: NVIDIA H100 80GB HBM3 (UUID: GPU-99999999-2222-3333-4444-555555555555)\n",
    );
    expect(first?.migDevices.map((device) => [device.index, device.profile])).toEqual([
      [0, "3g.40gb"],
      [1, "1g.10gb"],
    ]);
    expect(second?.migDevices).toEqual([]);
  });

  it("reads NVLink peers and NUMA nodes through the header's ANSI escapes", () => {
    const escape = String.fromCharCode(27);
    const matrix = parseTopology(
      `\t${escape}[4mGPU0\tGPU1\tNIC0\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID${escape}[0m\n` +
        "GPU0\t X \tNV18\tPXB\t0-55\t0\t\tN/A\nGPU1\tNV18\t X \tSYS\t56-111\t1\t\tN/A\nNIC0\tPXB\tSYS\t X \n\nLegend:\n",
    );
    expect(matrix).toEqual([
      { index: 0, nvlinkCount: 18, nvlinkPeers: [1], numaNode: 0 },
      { index: 1, nvlinkCount: 18, nvlinkPeers: [0], numaNode: 1 },
    ]);
  });

  it("keeps commas and line breaks of a process name from looking like rows", () => {
    expect(parseComputeApps(`${uuid}, 42, 7484, /opt/a, b, c\nrest of the name\n`)).toEqual([
      { gpuUuid: uuid, pid: 42, name: "/opt/a, b, c", memoryUsedBytes: 7484 * mib },
    ]);
  });

  it("knows nothing rather than nobody from an unreadable list", () => {
    expect(parseComputeApps("")).toEqual([]);
    expect(parseComputeApps("Failed to initialize NVML: Unknown Error\n")).toBeUndefined();
  });
});

const dir = recordingsDir();

/** [file, moment, reading] read off the captures by eye. */
const recorded = [
  [
    "h100-80gb-hbm3__590",
    "idle",
    {
      utilizationRatio: 0,
      memoryUsedBytes: 0,
      powerDrawWatts: 69.85,
      temperatureCelsius: 41,
      clockEventReasons: 1,
      migMode: "Disabled",
    },
  ],
  [
    "h100-80gb-hbm3__590",
    "load",
    {
      utilizationRatio: 1,
      memoryUtilizationRatio: 0.11,
      memoryUsedBytes: 19818 * mib,
      powerDrawWatts: 631.95,
      powerLimitWatts: 700,
      temperatureCelsius: 59,
      memoryTemperatureCelsius: 54,
      smClockMhz: 1980,
      memoryClockMhz: 2619,
      remappedRowsFailure: false,
      recoveryAction: "None",
    },
  ],
  [
    "h100-mig__590",
    "idle",
    {
      utilizationRatio: undefined,
      remappedRowsCorrectable: undefined,
      memoryUsedBytes: 59 * mib,
      powerDrawWatts: 71.15,
      migMode: "Enabled",
    },
  ],
  ["h100-mig__590", "load", { utilizationRatio: undefined, memoryUsedBytes: 11125 * mib }],
  [
    "h200-mig__590",
    "load",
    {
      memoryTotalBytes: 143771 * mib,
      memoryUsedBytes: 16959 * mib,
      powerDrawWatts: 295.01,
      migMode: "Enabled",
    },
  ],
  [
    "l40s__595",
    "load",
    {
      driverVersion: "595.80",
      utilizationRatio: 0.09,
      encoderUtilizationRatio: 0.6,
      memoryUsedBytes: 1235 * mib,
      memoryTemperatureCelsius: undefined,
      powerDrawWatts: 110.23,
      migMode: undefined,
    },
  ],
] as const;

function section(text: string, title: string): { readonly command: string; readonly body: string } {
  const match = new RegExp(`^# ${title}.*\\n# \\$ (.*)\\n#+\\n([\\s\\S]*?)\\n\\n`, "m").exec(text);
  return { command: match?.[1] ?? "", body: match?.[2] ?? "" };
}

describe.skipIf(dir === undefined)("recorded captures", () => {
  const folder = join(dir ?? "", "gpu/captures");
  const capture = (part: string): string => {
    const file = readdirSync(folder).find((name) => name.includes(part));
    if (file === undefined) throw new Error(`no capture ${part}`);
    return readFileSync(join(folder, file), "utf8");
  };
  it.each(recorded)("%s, %s", (part, moment, expected) => {
    const { command, body } = section(capture(part), `${moment} :: query-gpu \\(csv`);
    const list = parseFieldList(/--query-gpu=(\S+)/.exec(command)?.[1] ?? "");
    expect(list.length).toBeGreaterThan(180);
    const { gpus, unreadableRows } = parseCsvText(list, body);
    expect(unreadableRows).toBe(0);
    expect(gpus).toHaveLength(1);
    for (const [name, value] of Object.entries(expected)) {
      expect(gpus[0]?.[name as keyof (typeof gpus)[0]], name).toEqual(value);
    }
  });

  it("lists the slices of the H200", () => {
    const devices = parseList(section(capture("h200-mig"), "capabilities :: list").body)[0]?.migDevices ?? [];
    expect(devices.length).toBeGreaterThan(1);
    for (const device of devices) expect(device.profile).toMatch(/^(\dc\.)?\dg\.\d+gb$/);
  });

  it("reads every topology", () => {
    for (const file of readdirSync(folder)) {
      const { body } = section(readFileSync(join(folder, file), "utf8"), "capabilities :: topo -m");
      expect(parseTopology(body), file).toMatchObject([{ index: 0, nvlinkCount: 0, nvlinkPeers: [] }]);
    }
  });
});
