import type { GpuReading } from "../gpu/reading.ts";

const mib = 1024 * 1024;

/** Who uses a GPU right now, as labels of its series. */
export interface AllocationLabels {
  readonly allocationId: string;
  readonly tenantId: string;
}

export interface GpuSeriesInput {
  readonly reading: GpuReading;
  readonly lastXid: number | undefined;
  readonly allocation: AllocationLabels | undefined;
}

interface Family {
  readonly name: string;
  readonly type: "gauge" | "counter";
  readonly help: string;
  readonly value: (input: GpuSeriesInput) => number | undefined;
}

/**
 * dcgm-exporter's default counters, as far as nvidia-smi tells them, under the same names, types, units
 * and help texts (NVIDIA/dcgm-exporter, etc/default-counters.csv): existing dashboards keep working.
 * Left out: total energy, NVLink bandwidth, vGPU licence and the profiling metrics (DCGM_FI_PROF_*),
 * which nvidia-smi's queries do not hold.
 */
const families: readonly Family[] = [
  gauge("DCGM_FI_DEV_SM_CLOCK", "SM clock frequency (in MHz).", (r) => r.smClockMhz),
  gauge("DCGM_FI_DEV_MEM_CLOCK", "Memory clock frequency (in MHz).", (r) => r.memoryClockMhz),
  gauge("DCGM_FI_DEV_MEMORY_TEMP", "Memory temperature (in C).", (r) => r.memoryTemperatureCelsius),
  gauge("DCGM_FI_DEV_GPU_TEMP", "GPU temperature (in C).", (r) => r.temperatureCelsius),
  gauge("DCGM_FI_DEV_POWER_USAGE", "Power draw (in W).", (r) => r.powerDrawWatts),
  counter("DCGM_FI_DEV_PCIE_REPLAY_COUNTER", "Total number of PCIe retries.", (r) => r.pcieReplayCount),
  gauge("DCGM_FI_DEV_GPU_UTIL", "GPU utilization (in %).", (r) => percent(r.utilizationRatio)),
  gauge("DCGM_FI_DEV_MEM_COPY_UTIL", "Memory utilization (in %).", (r) => percent(r.memoryUtilizationRatio)),
  gauge("DCGM_FI_DEV_ENC_UTIL", "Encoder utilization (in %).", (r) => percent(r.encoderUtilizationRatio)),
  gauge("DCGM_FI_DEV_DEC_UTIL", "Decoder utilization (in %).", (r) => percent(r.decoderUtilizationRatio)),
  {
    name: "DCGM_FI_DEV_XID_ERRORS",
    type: "gauge",
    help: "Value of the last XID error encountered.",
    value: (input) => input.lastXid,
  },
  gauge("DCGM_FI_DEV_FB_FREE", "Framebuffer memory free (in MiB).", (r) => inMib(r.memoryFreeBytes)),
  gauge("DCGM_FI_DEV_FB_USED", "Framebuffer memory used (in MiB).", (r) => inMib(r.memoryUsedBytes)),
  gauge("DCGM_FI_DEV_FB_RESERVED", "Framebuffer memory reserved (in MiB).", (r) =>
    inMib(r.memoryReservedBytes),
  ),
  counter(
    "DCGM_FI_DEV_UNCORRECTABLE_REMAPPED_ROWS",
    "Number of remapped rows for uncorrectable errors",
    (r) => r.remappedRowsUncorrectable,
  ),
  counter(
    "DCGM_FI_DEV_CORRECTABLE_REMAPPED_ROWS",
    "Number of remapped rows for correctable errors",
    (r) => r.remappedRowsCorrectable,
  ),
  gauge("DCGM_FI_DEV_ROW_REMAP_FAILURE", "Whether remapping of rows has failed", (r) =>
    r.remappedRowsFailure === undefined ? undefined : Number(r.remappedRowsFailure),
  ),
];

/**
 * The per-GPU series as Prometheus text. A value that was not told makes no line, and a family without
 * any line is left out altogether: absent is not zero.
 */
export function renderGpuSeries(inputs: readonly GpuSeriesInput[], hostname: string): string {
  const labelled = inputs.map((input) => ({ input, labels: labelsOf(input, hostname) }));
  let text = "";
  for (const family of families) {
    let lines = "";
    for (const { input, labels } of labelled) {
      const value = family.value(input);
      if (value !== undefined) lines += `${family.name}{${labels}} ${String(value)}\n`;
    }
    if (lines === "") continue;
    text += `# HELP ${family.name} ${family.help}\n# TYPE ${family.name} ${family.type}\n${lines}`;
  }
  return text;
}

function labelsOf(input: GpuSeriesInput, hostname: string): string {
  const { reading, allocation } = input;
  const index = reading.index === undefined ? "" : String(reading.index);
  const labels: [string, string][] = [
    ["gpu", index],
    ["UUID", reading.uuid ?? ""],
    ["pci_bus_id", reading.pciBusId ?? ""],
    ["device", `nvidia${String(reading.minorNumber ?? index)}`],
    ["modelName", reading.model ?? ""],
    ["Hostname", hostname],
    ["DCGM_FI_DRIVER_VERSION", reading.driverVersion ?? ""],
  ];
  if (allocation !== undefined) {
    labels.push(["allocation_id", allocation.allocationId], ["tenant_id", allocation.tenantId]);
  }
  return labels.map(([name, value]) => `${name}="${escapeLabel(value)}"`).join(",");
}

function escapeLabel(value: string): string {
  return value.replaceAll("\\", "\\\\").replaceAll('"', '\\"').replaceAll("\n", "\\n");
}

function gauge(name: string, help: string, read: (reading: GpuReading) => number | undefined): Family {
  return { name, type: "gauge", help, value: (input) => read(input.reading) };
}

function counter(name: string, help: string, read: (reading: GpuReading) => number | undefined): Family {
  return { name, type: "counter", help, value: (input) => read(input.reading) };
}

function percent(ratio: number | undefined): number | undefined {
  // 0.57 * 100 is 56.99999999999999.
  return ratio === undefined ? undefined : Math.round(ratio * 10_000) / 100;
}

function inMib(bytes: number | undefined): number | undefined {
  return bytes === undefined ? undefined : Math.round(bytes / mib);
}
