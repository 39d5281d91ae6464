import { readdirSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { describe, expect, it } from "vitest";
import { recordingsDir } from "@palebluedot/shared/testing/recordings.ts";
import type { GpuReading } from "./reading.ts";
import { parseSmiXml } from "./xml.ts";

const mib = 1024 * 1024;

/** The smallest document with the given elements inside one GPU. */
function documentOf(gpu: string, head = "<driver_version>580.65.06</driver_version>"): string {
  return `<?xml version="1.0" ?>
<!DOCTYPE nvidia_smi_log SYSTEM "nvsmi_device_v13.dtd">
<nvidia_smi_log>
\t<timestamp>Mon Nov  2 10:00:00 2026</timestamp>
\t${head}
\t<cuda_version>13.0</cuda_version>
\t<attached_gpus>1</attached_gpus>
\t<gpu id="00000000:18:00.0">
\t\t<uuid>GPU-11111111-2222-3333-4444-555555555555</uuid>
\t\t${gpu}
\t</gpu>
</nvidia_smi_log>
`;
}

function reading(gpu: string, head?: string): GpuReading {
  const first = parseSmiXml(documentOf(gpu, head)).gpus[0];
  if (first === undefined) throw new Error("no GPU");
  return first;
}

describe("parseSmiXml follows elements through the drivers", () => {
  it.each([
    [
      "418 to 525",
      "<power_readings><power_draw>67.03 W</power_draw><power_limit>400.00 W</power_limit></power_readings>",
    ],
    [
      "535",
      "<gpu_power_readings><power_draw>67.03 W</power_draw><current_power_limit>400.00 W</current_power_limit></gpu_power_readings><module_power_readings><power_draw>900.00 W</power_draw></module_power_readings>",
    ],
    [
      "570 and later",
      "<gpu_power_readings><average_power_draw>67.03 W</average_power_draw><instant_power_draw>70.00 W</instant_power_draw><current_power_limit>400.00 W</current_power_limit></gpu_power_readings>",
    ],
    [
      "without an average",
      "<gpu_power_readings><average_power_draw>N/A</average_power_draw><instant_power_draw>67.03 W</instant_power_draw><current_power_limit>400.00 W</current_power_limit></gpu_power_readings>",
    ],
  ])("power, %s", (_, gpu) => {
    expect(reading(gpu)).toMatchObject({ powerDrawWatts: 67.03, powerLimitWatts: 400 });
  });

  it.each([
    ["before 535", "throttle"],
    ["535 and later", "event"],
  ])("clock reasons, %s", (_, word) => {
    const name = (reason: string): string => `clocks_${word}_reason_${reason}`;
    const gpu = `<clocks_${word}_reasons><${name("gpu_idle")}>Not Active</${name("gpu_idle")}><${name("hw_thermal_slowdown")}>Active</${name("hw_thermal_slowdown")}></clocks_${word}_reasons>`;
    expect(reading(gpu).clockEventReasons).toBe(0x40);
  });

  it.each([
    [
      "Pascal",
      "<volatile><single_bit><total>3</total></single_bit><double_bit><total>4</total></double_bit></volatile>",
    ],
    [
      "Ampere, one SRAM counter",
      "<volatile><sram_correctable>1</sram_correctable><sram_uncorrectable>1</sram_uncorrectable><dram_correctable>2</dram_correctable><dram_uncorrectable>3</dram_uncorrectable></volatile>",
    ],
    [
      "570, parity and SECDED",
      "<volatile><sram_correctable>1</sram_correctable><sram_uncorrectable_parity>1</sram_uncorrectable_parity><sram_uncorrectable_secded>1</sram_uncorrectable_secded><dram_correctable>2</dram_correctable><dram_uncorrectable>2</dram_uncorrectable></volatile>",
    ],
  ])("ECC, %s", (_, counters) => {
    expect(reading(`<ecc_errors>${counters}</ecc_errors>`)).toMatchObject({
      eccCorrectedVolatile: 3,
      eccUncorrectedVolatile: 4,
    });
  });

  it("takes remapped rows as text for not told, not for zero", () => {
    const gpu = reading("<remapped_rows>N/A</remapped_rows>");
    expect(gpu.remappedRowsCorrectable).toBeUndefined();
    expect(gpu.remappedRowsFailure).toBeUndefined();
    const told = reading(
      "<remapped_rows><remapped_row_corr>0</remapped_row_corr><remapped_row_unc>1</remapped_row_unc><remapped_row_pending>Yes</remapped_row_pending><remapped_row_failure>No</remapped_row_failure></remapped_rows>",
    );
    expect(told).toMatchObject({
      remappedRowsCorrectable: 0,
      remappedRowsUncorrectable: 1,
      remappedRowsPending: true,
      remappedRowsFailure: false,
    });
  });

  it("reads the versions under their new names once the old ones are deprecated", () => {
    const head =
      "<driver_version>Requested functionality has been deprecated</driver_version><kmd_version>610.10</kmd_version>";
    expect(reading("", head).driverVersion).toBe("610.10");
  });

  it("keeps apart elements that repeat under different parents", () => {
    const gpu = reading(`
      <mig_mode><current_mig>Enabled</current_mig><pending_mig>Enabled</pending_mig></mig_mode>
      <mig_devices><mig_device><index>0</index><gpu_instance_id>9</gpu_instance_id><compute_instance_id>0</compute_instance_id>
        <device_attributes><shared><multiprocessor_count>16</multiprocessor_count></shared></device_attributes>
        <fb_memory_usage><total>9856 MiB</total><used>12 MiB</used></fb_memory_usage></mig_device></mig_devices>
      <fb_memory_usage><total>81559 MiB</total><used>59 MiB</used></fb_memory_usage>
      <bar1_memory_usage><total>131072 MiB</total><used>1 MiB</used></bar1_memory_usage>
      <max_clocks><sm_clock>1980 MHz</sm_clock></max_clocks><clocks><sm_clock>345 MHz</sm_clock></clocks>`);
    expect(gpu).toMatchObject({
      memoryTotalBytes: 81559 * mib,
      memoryUsedBytes: 59 * mib,
      smClockMhz: 345,
      migMode: "Enabled",
    });
    expect(gpu.migDevices).toEqual([
      {
        index: 0,
        gpuInstanceId: 9,
        computeInstanceId: 0,
        memoryTotalBytes: 9856 * mib,
        memoryUsedBytes: 12 * mib,
        multiprocessorCount: 16,
      },
    ]);
  });
});

describe("parseSmiXml and hostile or broken documents", () => {
  it("does not let a process name forge elements or take a GPU away", () => {
    const gpu = reading(`<processes>
      <process_info><pid>7</pid><type>C</type><process_name></process_name><pid>1</pid><x> & GPU is lost</process_name><used_memory>10 MiB</used_memory></process_info>
      </processes><temperature><gpu_temp>40 C</gpu_temp></temperature>`);
    expect(gpu.processes).toHaveLength(1);
    expect(gpu.processes?.[0]).toMatchObject({ pid: 7, memoryUsedBytes: 10 * mib });
    expect(gpu.lost).toBeUndefined();
    expect(gpu.temperatureCelsius).toBe(40);
  });

  it("notices that the device says it is lost", () => {
    expect(reading("<temperature><gpu_temp>GPU is lost</gpu_temp></temperature>").lost).toBe(true);
  });

  it.each([
    ["an empty file", ""],
    ["a prefix of a document", documentOf("<serial>1</serial>").slice(0, 250)],
    ["another document", "<html></html>"],
  ])("refuses %s", (_, text) => {
    expect(() => parseSmiXml(text)).toThrow(/cannot be used/);
  });

  it("passes no control characters on", () => {
    const gpu = reading("<product_name>NV\u0007\u001B[31mIDIA\uFFFD</product_name>");
    expect(gpu.model).toBe("NV\uFFFDIDIA\uFFFD");
  });

  it.each(["-", "81559 GB", "0x12", "1e9 MiB", "99999999999999999999 MiB", "-5 MiB", "12 MiB extra"])(
    "takes %j for no memory size",
    (text) => {
      const used = `<fb_memory_usage><used>${text}</used></fb_memory_usage>`;
      expect(reading(used).memoryUsedBytes).toBeUndefined();
    },
  );
});

const dir = recordingsDir();

/** Read off the documents by eye. undefined: the document does not tell. */
const recorded: readonly (readonly [file: string, gpus: number, first: GpuReading])[] = [
  [
    "a100-sxm4-v12.xml",
    1,
    {
      driverVersion: "535.54.03",
      model: "NVIDIA A100-SXM4-80GB",
      pciBusId: "00000000:01:00.0",
      memoryTotalBytes: 81920 * mib,
      memoryUsedBytes: 50 * mib,
      temperatureCelsius: 27,
      memoryTemperatureCelsius: 44,
      powerDrawWatts: 67.03,
      powerLimitWatts: 500,
      utilizationRatio: undefined,
      smClockMhz: 1275,
      memoryClockMhz: 1593,
      eccUncorrectedVolatile: 0,
      remappedRowsCorrectable: undefined,
      migMode: "Enabled",
      clockEventReasons: 0,
      recoveryAction: undefined,
      resetRequired: false,
    },
  ],
  [
    "a10g.xml",
    1,
    {
      driverVersion: "515.105.01",
      model: "NVIDIA A10G",
      pciBusId: "00000000:00:1E.0",
      memoryTotalBytes: 23028 * mib,
      memoryUsedBytes: 22 * mib,
      temperatureCelsius: 17,
      memoryTemperatureCelsius: undefined,
      powerDrawWatts: 25.58,
      powerLimitWatts: 300,
      utilizationRatio: 0,
      smClockMhz: 210,
      memoryClockMhz: 405,
      eccUncorrectedVolatile: 0,
      remappedRowsCorrectable: 0,
      migMode: undefined,
      clockEventReasons: 1,
      recoveryAction: undefined,
    },
  ],
  [
    "gtx-1660-ti.xml",
    1,
    {
      driverVersion: "418.43",
      model: "Graphics Device",
      serial: undefined,
      pciBusId: "00000000:43:00.0",
      memoryTotalBytes: 5912 * mib,
      memoryUsedBytes: 0,
      temperatureCelsius: 40,
      powerDrawWatts: 8.93,
      powerLimitWatts: 130,
      utilizationRatio: 0,
      memoryUtilizationRatio: 0.01,
      smClockMhz: 300,
      eccUncorrectedVolatile: undefined,
      migDevices: undefined,
      clockEventReasons: 1,
    },
  ],
  [
    "quadro-p2000-v12.xml",
    1,
    {
      driverVersion: "525.125.06",
      model: "Quadro P2000",
      pciBusId: "00000000:17:00.0",
      memoryTotalBytes: 5120 * mib,
      memoryUsedBytes: mib,
      temperatureCelsius: 34,
      powerDrawWatts: 4.61,
      powerLimitWatts: 75,
      fanSpeedRatio: 0.46,
      smClockMhz: 139,
      eccCorrectedVolatile: undefined,
      eccUncorrectedVolatile: undefined,
      remappedRowsFailure: undefined,
    },
  ],
  [
    "qx-b200.xml",
    8,
    {
      driverVersion: "580.105.08",
      model: "NVIDIA B200",
      serial: "1650000000001",
      pciBusId: "00000000:8F:00.0",
      memoryTotalBytes: 183359 * mib,
      memoryUsedBytes: 0,
      temperatureCelsius: 39,
      memoryTemperatureCelsius: 39,
      powerDrawWatts: 195.68,
      powerLimitWatts: 1000,
      utilizationRatio: 0,
      smClockMhz: 120,
      memoryClockMhz: 3996,
      fanSpeedRatio: undefined,
      eccSramThresholdExceeded: false,
      migMode: "Disabled",
      recoveryAction: "None",
    },
  ],
  [
    "qx-gb200.xml",
    4,
    {
      driverVersion: "580.173.02",
      model: "NVIDIA GB200",
      pciBusId: "00000000:29:00.0",
      memoryTotalBytes: 189471 * mib,
      temperatureCelsius: 27,
      powerDrawWatts: 165.93,
      powerLimitWatts: 1200,
      smClockMhz: 120,
      unrepairableMemory: false,
      recoveryAction: "None",
    },
  ],
  [
    "qx-h100.xml",
    8,
    {
      driverVersion: "580.105.08",
      cudaVersion: "13.0",
      model: "NVIDIA H100 80GB HBM3",
      pciBusId: "00000000:53:00.0",
      memoryTotalBytes: 81559 * mib,
      memoryUsedBytes: 0,
      temperatureCelsius: 29,
      memoryTemperatureCelsius: 37,
      powerDrawWatts: 68.57,
      powerLimitWatts: 700,
      smClockMhz: 345,
      memoryClockMhz: 2619,
      migMode: "Disabled",
      recoveryAction: "None",
    },
  ],
  [
    "qx-l40s.xml",
    1,
    {
      driverVersion: "595.91.07",
      cudaVersion: "13.2",
      model: "NVIDIA L40S",
      pciBusId: "00000000:30:00.0",
      memoryTotalBytes: 46068 * mib,
      temperatureCelsius: 29,
      memoryTemperatureCelsius: undefined,
      powerDrawWatts: 65.64,
      powerLimitWatts: 350,
      smClockMhz: 2040,
      memoryClockMhz: 9001,
      migMode: undefined,
      recoveryAction: "None",
    },
  ],
  [
    "rtx-3060-v12.xml",
    1,
    {
      driverVersion: "570.124.04",
      model: "NVIDIA GeForce RTX 3060",
      serial: undefined,
      memoryTotalBytes: 12288 * mib,
      memoryUsedBytes: 116 * mib,
      temperatureCelsius: 42,
      powerDrawWatts: 11.6,
      powerLimitWatts: 170,
      powerLimitMaxWatts: 190,
      eccCorrectedVolatile: undefined,
      recoveryAction: "None",
      resetRequired: undefined,
    },
  ],
  [
    "rtx-3080-v12.xml",
    1,
    {
      driverVersion: "536.40",
      model: "NVIDIA GeForce RTX 3080",
      memoryTotalBytes: 10240 * mib,
      memoryUsedBytes: 1128 * mib,
      temperatureCelsius: 31,
      powerDrawWatts: 22.78,
      powerLimitWatts: 336,
      recoveryAction: undefined,
    },
  ],
  [
    "rtx-3080-v13.xml",
    1,
    {
      driverVersion: "595.58.03",
      model: "NVIDIA GeForce RTX 3080",
      memoryTotalBytes: 10240 * mib,
      memoryUsedBytes: 9184 * mib,
      temperatureCelsius: 27,
      powerDrawWatts: 139.62,
      powerLimitWatts: 320,
      utilizationRatio: 0.65,
      memoryUtilizationRatio: 0.09,
      performanceState: "P2",
      recoveryAction: "None",
    },
  ],
  [
    "tesla-t4.xml",
    1,
    {
      driverVersion: "515.105.01",
      model: "Tesla T4",
      memoryTotalBytes: 15360 * mib,
      memoryUsedBytes: 1032 * mib,
      temperatureCelsius: 40,
      powerDrawWatts: 26.78,
      powerLimitWatts: 70,
      utilizationRatio: 0,
      smClockMhz: 585,
      memoryClockMhz: 5000,
      retiredPagesPending: false,
      remappedRowsCorrectable: undefined,
    },
  ],
];

describe.skipIf(dir === undefined)("recorded documents", () => {
  const folder = join(dir ?? "", "gpu/xml");

  it.each(recorded)("%s", (file, gpus, first) => {
    const document = parseSmiXml(readFileSync(join(folder, file), "utf8"));
    expect(document.gpus).toHaveLength(gpus);
    const { ...actual } = document.gpus[0];
    for (const [name, value] of Object.entries(first)) {
      expect(actual[name as keyof GpuReading], name).toEqual(value);
    }
    // Nothing that makes a GPU identifiable may be missing on any of them.
    for (const gpu of document.gpus) {
      expect(gpu.uuid).toMatch(/^GPU-/);
      expect(gpu.pciBusId).toMatch(/^0{8}:[0-9A-F]{2}:[0-9A-F]{2}\.0$/);
    }
  });

  it("are all in the table", () => {
    expect(recorded.map(([file]) => file).sort()).toEqual(readdirSync(folder).sort());
  });

  it("tell the four slices of the recorded A100", () => {
    const document = parseSmiXml(readFileSync(join(folder, "a100-sxm4-v12.xml"), "utf8"));
    expect(document.gpus[0]?.migDevices?.map((device) => device.gpuInstanceId)).toEqual([3, 4, 5, 6]);
    expect(document.gpus[0]?.migDevices?.[0]?.memoryTotalBytes).toBe(19968 * mib);
  });
});
