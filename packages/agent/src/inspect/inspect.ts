import { open, readFile, stat } from "node:fs/promises";
import { errorMessage, PlatformError } from "@palebluedot/shared/errors.ts";
import { maxRowLength, parseCsvText, parseFieldList } from "../gpu/csv.ts";
import { maxKernelLineLength, parseKernelLine, type KernelGpuEvent } from "../gpu/kernel-log.ts";
import { clockEventReasonNames, type GpuReading } from "../gpu/reading.ts";
import { maxXmlBytes, parseSmiXml } from "../gpu/xml.ts";

export interface InspectArguments {
  /** Output of `nvidia-smi -q -x`. */
  readonly nvidiaSmiXml?: string | undefined;
  /** Output of `nvidia-smi --query-gpu=<fields> --format=csv`, with or without header and units. */
  readonly nvidiaSmiCsv?: string | undefined;
  /** The fields of the CSV file in order, comma separated; required with it. */
  readonly fields?: string | undefined;
  /** dmesg, journalctl -k, syslog or /dev/kmsg. */
  readonly kernelLog?: string | undefined;
}

const maxLogBytes = 256 * 1024 * 1024;
const maxEvents = 10_000;

/**
 * What the agent would report from recorded documents, as JSON with snake_case names: `gpus` and
 * `events`. What a document does not tell is null. Throws PlatformError `nothing-to-inspect`,
 * `fields-missing`, `file-unreadable`, `csv-unreadable` or `smi-document-invalid`.
 */
export async function runInspect(args: InspectArguments): Promise<object> {
  if (args.nvidiaSmiXml === undefined && args.nvidiaSmiCsv === undefined && args.kernelLog === undefined) {
    throw new PlatformError({
      code: "nothing-to-inspect",
      kind: "invalid",
      message: "no document was given",
      hint: "pass --nvidia-smi-xml FILE, --nvidia-smi-csv FILE --fields LIST, or --kernel-log FILE",
    });
  }
  const gpus: object[] = [];
  if (args.nvidiaSmiXml !== undefined) {
    gpus.push(...parseSmiXml(await readBounded(args.nvidiaSmiXml, maxXmlBytes)).gpus.map(describeGpu));
  }
  if (args.nvidiaSmiCsv !== undefined) {
    gpus.push(...(await inspectCsv(args.nvidiaSmiCsv, args.fields)));
  }
  const events = args.kernelLog === undefined ? [] : await inspectKernelLog(args.kernelLog);
  return { gpus, events };
}

async function inspectCsv(file: string, fieldList: string | undefined): Promise<object[]> {
  const fields = parseFieldList(fieldList ?? "");
  if (fields.length === 0) {
    throw new PlatformError({
      code: "fields-missing",
      kind: "invalid",
      message: "a CSV file does not say which fields it holds",
      hint: "pass --fields with the list that was given to nvidia-smi --query-gpu=",
    });
  }
  const { gpus, unreadableRows } = parseCsvText(fields, await readBounded(file, maxRowLength * 1024));
  if (gpus.length === 0 || unreadableRows > 0) {
    throw new PlatformError({
      code: "csv-unreadable",
      kind: "invalid",
      message: `${String(unreadableRows)} rows do not hold ${String(fields.length)} values`,
      hint: "--fields must name every column, in the file's order",
    });
  }
  return gpus.map(describeGpu);
}

async function inspectKernelLog(file: string): Promise<object[]> {
  await refuseLarger(file, maxLogBytes);
  const events: object[] = [];
  const handle = await open(file).catch((error: unknown) => {
    throw unreadable(file, error);
  });
  try {
    let rest = "";
    const decoder = new TextDecoder();
    for await (const chunk of handle.createReadStream({ autoClose: false }) as AsyncIterable<Buffer>) {
      const lines = (rest + decoder.decode(chunk, { stream: true })).split("\n");
      rest = (lines.pop() ?? "").slice(0, maxKernelLineLength + 1);
      for (const line of lines) collectEvent(line, events);
    }
    collectEvent(rest, events);
  } finally {
    await handle.close();
  }
  return events;
}

function collectEvent(line: string, events: object[]): void {
  const event = events.length < maxEvents ? parseKernelLine(line.replace(/\r$/, "")) : undefined;
  if (event !== undefined) events.push(describeEvent(event));
}

/** One entry of `events`. */
function describeEvent(event: KernelGpuEvent): object {
  return {
    kind: event.kind,
    xid: event.kind === "xid" ? (event.number ?? null) : null,
    sxid: event.kind === "sxid" ? (event.number ?? null) : null,
    pci_bus_id: event.pciBusId,
    time: event.timeUnixMs === undefined ? null : new Date(event.timeUnixMs).toISOString(),
    uptime_seconds: event.uptimeSeconds ?? null,
    pid: event.pid ?? null,
    process_name: event.processName ?? null,
    name: event.name ?? null,
    action: event.action ?? null,
    message: event.message,
  };
}

/** One entry of `gpus`. */
function describeGpu(gpu: GpuReading): object {
  return {
    index: gpu.index ?? null,
    uuid: gpu.uuid ?? null,
    model: gpu.model ?? null,
    serial: gpu.serial ?? null,
    pci_bus_id: gpu.pciBusId ?? null,
    minor_number: gpu.minorNumber ?? null,
    architecture: gpu.architecture ?? null,
    driver_version: gpu.driverVersion ?? null,
    cuda_version: gpu.cudaVersion ?? null,
    vbios_version: gpu.vbiosVersion ?? null,
    persistence_mode: gpu.persistenceMode ?? null,
    performance_state: gpu.performanceState ?? null,
    memory_total_bytes: gpu.memoryTotalBytes ?? null,
    memory_reserved_bytes: gpu.memoryReservedBytes ?? null,
    memory_used_bytes: gpu.memoryUsedBytes ?? null,
    memory_free_bytes: gpu.memoryFreeBytes ?? null,
    temperature_celsius: gpu.temperatureCelsius ?? null,
    memory_temperature_celsius: gpu.memoryTemperatureCelsius ?? null,
    power_draw_watts: gpu.powerDrawWatts ?? null,
    power_limit_watts: gpu.powerLimitWatts ?? null,
    power_limit_max_watts: gpu.powerLimitMaxWatts ?? null,
    utilization_ratio: gpu.utilizationRatio ?? null,
    memory_utilization_ratio: gpu.memoryUtilizationRatio ?? null,
    encoder_utilization_ratio: gpu.encoderUtilizationRatio ?? null,
    decoder_utilization_ratio: gpu.decoderUtilizationRatio ?? null,
    sm_clock_mhz: gpu.smClockMhz ?? null,
    memory_clock_mhz: gpu.memoryClockMhz ?? null,
    fan_speed_ratio: gpu.fanSpeedRatio ?? null,
    pcie: {
      generation: gpu.pcieGeneration ?? null,
      generation_max: gpu.pcieGenerationMax ?? null,
      width: gpu.pcieWidth ?? null,
      width_max: gpu.pcieWidthMax ?? null,
      replay_count: gpu.pcieReplayCount ?? null,
    },
    ecc: {
      mode_current: gpu.eccModeCurrent ?? null,
      mode_pending: gpu.eccModePending ?? null,
      corrected_volatile: gpu.eccCorrectedVolatile ?? null,
      uncorrected_volatile: gpu.eccUncorrectedVolatile ?? null,
      corrected_aggregate: gpu.eccCorrectedAggregate ?? null,
      uncorrected_aggregate: gpu.eccUncorrectedAggregate ?? null,
      sram_threshold_exceeded: gpu.eccSramThresholdExceeded ?? null,
      channel_repair_pending: gpu.channelRepairPending ?? null,
      tpc_repair_pending: gpu.tpcRepairPending ?? null,
      unrepairable_memory: gpu.unrepairableMemory ?? null,
    },
    remapped_rows: {
      correctable: gpu.remappedRowsCorrectable ?? null,
      uncorrectable: gpu.remappedRowsUncorrectable ?? null,
      pending: gpu.remappedRowsPending ?? null,
      failure: gpu.remappedRowsFailure ?? null,
    },
    retired_pages_pending: gpu.retiredPagesPending ?? null,
    throttle_reasons:
      gpu.clockEventReasons === undefined ? null : clockEventReasonNames(gpu.clockEventReasons),
    recovery_action: gpu.recoveryAction ?? null,
    reset_required: gpu.resetRequired ?? null,
    drain_and_reset_recommended: gpu.drainAndResetRecommended ?? null,
    mig: {
      mode: gpu.migMode ?? null,
      pending: gpu.migPending ?? null,
      devices:
        gpu.migDevices?.map((device) => ({
          index: device.index,
          gpu_instance_id: device.gpuInstanceId ?? null,
          compute_instance_id: device.computeInstanceId ?? null,
          uuid: device.uuid ?? null,
          profile: device.profile ?? null,
          memory_total_bytes: device.memoryTotalBytes ?? null,
          memory_used_bytes: device.memoryUsedBytes ?? null,
          multiprocessor_count: device.multiprocessorCount ?? null,
        })) ?? null,
    },
    processes:
      gpu.processes?.map((process) => ({
        pid: process.pid,
        type: process.type ?? null,
        name: process.name,
        memory_used_bytes: process.memoryUsedBytes ?? null,
      })) ?? null,
  };
}

async function readBounded(file: string, maxBytes: number): Promise<string> {
  await refuseLarger(file, maxBytes);
  try {
    return new TextDecoder().decode(await readFile(file));
  } catch (error) {
    throw unreadable(file, error);
  }
}

async function refuseLarger(file: string, maxBytes: number): Promise<void> {
  const { size } = await stat(file).catch((error: unknown) => {
    throw unreadable(file, error);
  });
  if (size > maxBytes) {
    throw new PlatformError({
      code: "file-too-large",
      kind: "too-large",
      message: `${file} has ${String(size)} bytes; at most ${String(maxBytes)} are read`,
    });
  }
}

function unreadable(file: string, error: unknown): PlatformError {
  return new PlatformError({
    code: "file-unreadable",
    kind: "invalid",
    message: `${file} cannot be read: ${errorMessage(error)}`,
    cause: error,
  });
}
