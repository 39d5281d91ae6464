import { XMLParser } from "fast-xml-parser";
import { PlatformError } from "@palebluedot/shared/errors.ts";
import { clockEventReasonBits, type GpuReading, type MigReading, type ProcessReading } from "./reading.ts";
import {
  cleanText,
  count,
  flag,
  gpuUuid,
  memoryBytes,
  pciBusId,
  quantity,
  ratio,
  saysGpuLost,
  saysGpuRequiresReset,
  told,
  wholeQuantity,
} from "./values.ts";

/** What `nvidia-smi -q -x` printed. */
export interface SmiDocument {
  readonly driverVersion: string | undefined;
  readonly cudaVersion: string | undefined;
  /** The document's own count; more than gpus.length where GPUs could not be opened. */
  readonly attachedGpus: number | undefined;
  readonly gpus: GpuReading[];
}

/** A document of 16 GPUs without its clock tables is 400 kB; the tables triple that. */
export const maxXmlBytes = 16 * 1024 * 1024;
const maxGpus = 64;
const maxMigDevicesPerGpu = 64;
const maxProcessesPerGpu = 1024;

interface Element {
  readonly [name: string]: Node | readonly Node[] | undefined;
}
type Node = string | Element;

const parser = new XMLParser({
  ignoreAttributes: false,
  attributeNamePrefix: "@",
  parseTagValue: false,
  parseAttributeValue: false,
  ignoreDeclaration: true,
  ignorePiTags: true,
  isArray: (name) => name === "gpu" || name === "mig_device" || name === "process_info",
});

/**
 * Parses by element path and never by the DTD's version: NVIDIA moves elements between drivers of the
 * same DTD and keeps them between different ones. Throws PlatformError `smi-document-invalid`.
 */
export function parseSmiXml(text: string): SmiDocument {
  if (text.length > maxXmlBytes) throw invalid(`larger than ${String(maxXmlBytes)} bytes`);
  // Killed in the middle, nvidia-smi leaves a prefix that a lenient parser would take for a small host.
  if (!/<\/nvidia_smi_log>\s*$/.test(text)) throw invalid("it does not end with </nvidia_smi_log>");
  let root: Element;
  try {
    root = parser.parse(withoutHazards(text)) as Element;
  } catch (error) {
    throw invalid("it is not well-formed XML", error);
  }
  const log = child(root, "nvidia_smi_log");
  if (log === undefined) throw invalid("it has no nvidia_smi_log element");
  const driverVersion = first(log, "driver_version", "kmd_version");
  const cudaVersion = first(log, "cuda_version", "cuda_umd_version");
  const gpus = children(log, "gpu").slice(0, maxGpus);
  return {
    driverVersion,
    cudaVersion,
    attachedGpus: count(textAt(log, "attached_gpus")),
    gpus: gpus.map((gpu, index) => ({ index, ...parseGpu(gpu), driverVersion, cudaVersion })),
  };
}

function parseGpu(gpu: Element): GpuReading {
  const migMode = textAt(gpu, "mig_mode/current_mig");
  // Process names belong to tenants: one that is called "GPU is lost" must not take a GPU away.
  const everything = JSON.stringify({ ...gpu, processes: undefined, accounted_processes: undefined });
  return {
    uuid: gpuUuid(textAt(gpu, "uuid")),
    model: first(gpu, "product_name"),
    serial: first(gpu, "serial"),
    pciBusId: pciBusId(textAt(gpu, "pci/pci_bus_id") ?? textAt(gpu, "@id")),
    vbiosVersion: first(gpu, "vbios_version"),
    architecture: first(gpu, "product_architecture"),
    minorNumber: count(textAt(gpu, "minor_number")),
    persistenceMode: flag(textAt(gpu, "persistence_mode")),
    memoryTotalBytes: memoryBytes(textAt(gpu, "fb_memory_usage/total")),
    memoryReservedBytes: memoryBytes(textAt(gpu, "fb_memory_usage/reserved")),
    memoryUsedBytes: memoryBytes(textAt(gpu, "fb_memory_usage/used")),
    memoryFreeBytes: memoryBytes(textAt(gpu, "fb_memory_usage/free")),
    temperatureCelsius: quantity(textAt(gpu, "temperature/gpu_temp"), "C"),
    memoryTemperatureCelsius: quantity(textAt(gpu, "temperature/memory_temp"), "C"),
    ...power(gpu),
    utilizationRatio: ratio(textAt(gpu, "utilization/gpu_util")),
    memoryUtilizationRatio: ratio(textAt(gpu, "utilization/memory_util")),
    encoderUtilizationRatio: ratio(textAt(gpu, "utilization/encoder_util")),
    decoderUtilizationRatio: ratio(textAt(gpu, "utilization/decoder_util")),
    smClockMhz: wholeQuantity(textAt(gpu, "clocks/sm_clock"), "MHz"),
    memoryClockMhz: wholeQuantity(textAt(gpu, "clocks/mem_clock"), "MHz"),
    fanSpeedRatio: ratio(textAt(gpu, "fan_speed")),
    performanceState: first(gpu, "performance_state"),
    ...pcie(gpu),
    clockEventReasons: clockEventReasons(gpu),
    ...ecc(gpu),
    ...memoryRepair(gpu),
    recoveryAction: first(gpu, "gpu_recovery_action"),
    resetRequired: flag(textAt(gpu, "gpu_reset_status/reset_required")),
    drainAndResetRecommended: flag(textAt(gpu, "gpu_reset_status/drain_and_reset_recommended")),
    migMode: told(migMode),
    migPending: told(textAt(gpu, "mig_mode/pending_mig")),
    migDevices: migDevices(gpu),
    processes: processes(gpu),
    lost: saysGpuLost(everything) || undefined,
    requiresReset: saysGpuRequiresReset(everything) || undefined,
  };
}

function power(gpu: Element): GpuReading {
  const watts = (...paths: readonly string[]): number | undefined => {
    for (const path of paths) {
      const value = quantity(textAt(gpu, path), "W");
      if (value !== undefined) return value;
    }
    return undefined;
  };
  return {
    // <= 525, 535, then 570: the one-second average is what CSV's power.draw tells.
    powerDrawWatts: watts(
      "gpu_power_readings/power_draw",
      "gpu_power_readings/average_power_draw",
      "gpu_power_readings/instant_power_draw",
      "power_readings/power_draw",
    ),
    powerLimitWatts: watts(
      "gpu_power_readings/current_power_limit",
      "gpu_power_readings/requested_power_limit",
      "power_readings/enforced_power_limit",
      "power_readings/power_limit",
    ),
    powerLimitMaxWatts: watts("gpu_power_readings/max_power_limit", "power_readings/max_power_limit"),
  };
}

function pcie(gpu: Element): GpuReading {
  const link = "pci/pci_gpu_link_info";
  return {
    pcieGeneration: count(textAt(gpu, `${link}/pcie_gen/current_link_gen`)),
    pcieGenerationMax: count(textAt(gpu, `${link}/pcie_gen/max_link_gen`)),
    pcieWidth: count(textAt(gpu, `${link}/link_widths/current_link_width`), "x"),
    pcieWidthMax: count(textAt(gpu, `${link}/link_widths/max_link_width`), "x"),
    pcieReplayCount: count(textAt(gpu, "pci/replay_counter")),
  };
}

function clockEventReasons(gpu: Element): number | undefined {
  let mask: number | undefined;
  for (const [name, bit] of clockEventReasonBits) {
    const active = flag(
      textAt(gpu, `clocks_event_reasons/clocks_event_reason_${name}`) ??
        textAt(gpu, `clocks_throttle_reasons/clocks_throttle_reason_${name}`),
    );
    if (active !== undefined) mask = (mask ?? 0) + (active ? bit : 0);
  }
  return mask;
}

/** Sum of the counters that were told; undefined when none was. */
function sum(...values: readonly (number | undefined)[]): number | undefined {
  const known = values.filter((value) => value !== undefined);
  return known.length === 0 ? undefined : known.reduce((total, value) => total + value, 0);
}

function ecc(gpu: Element): GpuReading {
  const at = (path: string): number | undefined => count(textAt(gpu, `ecc_errors/${path}`));
  const corrected = (period: string): number | undefined =>
    sum(at(`${period}/sram_correctable`), at(`${period}/dram_correctable`), at(`${period}/single_bit/total`));
  const uncorrected = (period: string): number | undefined =>
    sum(
      at(`${period}/sram_uncorrectable`),
      at(`${period}/sram_uncorrectable_parity`),
      at(`${period}/sram_uncorrectable_secded`),
      at(`${period}/dram_uncorrectable`),
      at(`${period}/double_bit/total`),
    );
  return {
    eccModeCurrent: flag(textAt(gpu, "ecc_mode/current_ecc")),
    eccModePending: flag(textAt(gpu, "ecc_mode/pending_ecc")),
    eccCorrectedVolatile: corrected("volatile"),
    eccUncorrectedVolatile: uncorrected("volatile"),
    eccCorrectedAggregate: corrected("aggregate"),
    eccUncorrectedAggregate: uncorrected("aggregate"),
    eccSramThresholdExceeded: flag(textAt(gpu, "ecc_errors/aggregate/sram_threshold_exceeded")),
    channelRepairPending: flag(textAt(gpu, "ecc_errors/channel_repair_pending")),
    tpcRepairPending: flag(textAt(gpu, "ecc_errors/tpc_repair_pending")),
    unrepairableMemory: flag(textAt(gpu, "ecc_errors/unrepairable_memory")),
  };
}

function memoryRepair(gpu: Element): GpuReading {
  return {
    remappedRowsCorrectable: count(textAt(gpu, "remapped_rows/remapped_row_corr")),
    remappedRowsUncorrectable: count(textAt(gpu, "remapped_rows/remapped_row_unc")),
    remappedRowsPending: flag(textAt(gpu, "remapped_rows/remapped_row_pending")),
    remappedRowsFailure: flag(textAt(gpu, "remapped_rows/remapped_row_failure")),
    retiredPagesPending: flag(
      textAt(gpu, "retired_pages/pending_retirement") ?? textAt(gpu, "retired_pages/pending_blacklist"),
    ),
  };
}

function migDevices(gpu: Element): MigReading[] | undefined {
  const section = gpu["mig_devices"];
  if (section === undefined) return undefined;
  if (typeof section === "string") return [];
  const devices: MigReading[] = [];
  for (const device of children(section as Element, "mig_device").slice(0, maxMigDevicesPerGpu)) {
    const index = count(textAt(device, "index"));
    if (index === undefined) continue;
    devices.push({
      index,
      gpuInstanceId: count(textAt(device, "gpu_instance_id")),
      computeInstanceId: count(textAt(device, "compute_instance_id")),
      memoryTotalBytes: memoryBytes(textAt(device, "fb_memory_usage/total")),
      memoryUsedBytes: memoryBytes(textAt(device, "fb_memory_usage/used")),
      multiprocessorCount: count(textAt(device, "device_attributes/shared/multiprocessor_count")),
    });
  }
  return devices;
}

function processes(gpu: Element): ProcessReading[] | undefined {
  const section = gpu["processes"];
  if (section === undefined) return undefined;
  if (typeof section === "string") return [];
  const found: ProcessReading[] = [];
  for (const info of children(section as Element, "process_info").slice(0, maxProcessesPerGpu)) {
    const pid = count(textAt(info, "pid"));
    if (pid === undefined) continue;
    found.push({
      pid,
      type: first(info, "type"),
      name: cleanText(textAt(info, "process_name") ?? ""),
      memoryUsedBytes: memoryBytes(textAt(info, "used_memory")),
    });
  }
  return found;
}

/**
 * Drops the clock tables (nine tenths of the bytes, of no use here) and escapes process names: a
 * tenant chooses them, and nvidia-smi prints them as they are.
 */
function withoutHazards(text: string): string {
  return text.replace(/<supported_clocks>[\s\S]*?<\/supported_clocks>/g, "").replace(
    /(<process_name>)(.*)(<\/process_name>)/g,
    (_, open: string, name: string, close: string) =>
      `${open}${name
        .replace(/&(?!(?:amp|lt|gt|quot|apos);)/g, "&amp;")
        .replaceAll("<", "&lt;")
        .replaceAll(">", "&gt;")}${close}`,
  );
}

function child(element: Element, name: string): Element | undefined {
  const node = element[name];
  return typeof node === "object" && !Array.isArray(node) ? (node as Element) : undefined;
}

function children(element: Element, name: string): Element[] {
  const node = element[name];
  if (!Array.isArray(node)) return [];
  return (node as readonly Node[]).filter((item): item is Element => typeof item === "object");
}

/** Text at a path; undefined when an element is missing, or holds elements instead of text. */
function textAt(element: Element, path: string): string | undefined {
  let node: Node | readonly Node[] | undefined = element;
  for (const name of path.split("/")) {
    if (typeof node !== "object" || Array.isArray(node)) return undefined;
    node = (node as Element)[name];
  }
  return typeof node === "string" ? cleanText(node) : undefined;
}

function first(element: Element, ...paths: readonly string[]): string | undefined {
  for (const path of paths) {
    const value = told(textAt(element, path));
    if (value !== undefined) return value;
  }
  return undefined;
}

function invalid(why: string, cause?: unknown): PlatformError {
  return new PlatformError({
    code: "smi-document-invalid",
    kind: "invalid",
    message: `the nvidia-smi XML document cannot be used: ${why}`,
    hint: "record it with `nvidia-smi -q -x` and keep the whole output",
    cause,
  });
}
