import type { GpuReading } from "./reading.ts";
import {
  bitMask,
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

type Setter = (reading: GpuReading, text: string) => void;

/** Field names of `--query-gpu`, with the aliases that `--help-query-gpu` lists. */
const fieldSetters: ReadonlyMap<string, Setter> = new Map<string, Setter>(
  (
    [
      [["index"], (r, t) => (r.index = count(t))],
      [["uuid", "gpu_uuid"], (r, t) => (r.uuid = gpuUuid(t))],
      [["name", "gpu_name"], (r, t) => (r.model = told(t))],
      [["serial", "gpu_serial"], (r, t) => (r.serial = told(t))],
      [["pci.bus_id", "gpu_bus_id"], (r, t) => (r.pciBusId = pciBusId(t))],
      [["driver_version", "kmd_version"], (r, t) => (r.driverVersion ??= told(t))],
      [["cuda_version", "cuda_umd_version"], (r, t) => (r.cudaVersion ??= told(t))],
      [["vbios_version"], (r, t) => (r.vbiosVersion = told(t))],
      [["persistence_mode"], (r, t) => (r.persistenceMode = flag(t))],
      [["memory.total"], (r, t) => (r.memoryTotalBytes = memoryBytes(t))],
      [["memory.reserved"], (r, t) => (r.memoryReservedBytes = memoryBytes(t))],
      [["memory.used"], (r, t) => (r.memoryUsedBytes = memoryBytes(t))],
      [["memory.free"], (r, t) => (r.memoryFreeBytes = memoryBytes(t))],
      [["temperature.gpu"], (r, t) => (r.temperatureCelsius = quantity(t, "C"))],
      [["temperature.memory"], (r, t) => (r.memoryTemperatureCelsius = quantity(t, "C"))],
      // power.draw is the one-second average from Ampere on; the others stand in where it is not told.
      [["power.draw"], (r, t) => (r.powerDrawWatts = quantity(t, "W") ?? r.powerDrawWatts)],
      [
        ["power.draw.average", "gpu.power.draw.average", "power.draw.instant", "gpu.power.draw.instant"],
        (r, t) => (r.powerDrawWatts ??= quantity(t, "W")),
      ],
      [
        ["enforced.power.limit", "gpu.power.current_limit"],
        (r, t) => (r.powerLimitWatts = quantity(t, "W") ?? r.powerLimitWatts),
      ],
      [["power.limit", "gpu.power.requested_limit"], (r, t) => (r.powerLimitWatts ??= quantity(t, "W"))],
      [["power.max_limit", "gpu.power.max_limit"], (r, t) => (r.powerLimitMaxWatts = quantity(t, "W"))],
      [["utilization.gpu"], (r, t) => (r.utilizationRatio = ratio(t))],
      [["utilization.memory"], (r, t) => (r.memoryUtilizationRatio = ratio(t))],
      [["utilization.encoder"], (r, t) => (r.encoderUtilizationRatio = ratio(t))],
      [["utilization.decoder"], (r, t) => (r.decoderUtilizationRatio = ratio(t))],
      [["clocks.current.sm", "clocks.sm"], (r, t) => (r.smClockMhz = wholeQuantity(t, "MHz"))],
      [["clocks.current.memory", "clocks.mem"], (r, t) => (r.memoryClockMhz = wholeQuantity(t, "MHz"))],
      [["fan.speed"], (r, t) => (r.fanSpeedRatio = ratio(t))],
      [["pstate"], (r, t) => (r.performanceState = told(t))],
      [["pcie.link.gen.gpucurrent"], (r, t) => (r.pcieGeneration = count(t) ?? r.pcieGeneration)],
      [["pcie.link.gen.current"], (r, t) => (r.pcieGeneration ??= count(t))],
      [["pcie.link.gen.max"], (r, t) => (r.pcieGenerationMax = count(t))],
      [["pcie.link.width.current"], (r, t) => (r.pcieWidth = count(t, "x"))],
      [["pcie.link.width.max"], (r, t) => (r.pcieWidthMax = count(t, "x"))],
      [
        ["clocks_event_reasons.active", "clocks_throttle_reasons.active"],
        (r, t) => (r.clockEventReasons = bitMask(t)),
      ],
      [["ecc.mode.current"], (r, t) => (r.eccModeCurrent = flag(t))],
      [["ecc.mode.pending"], (r, t) => (r.eccModePending = flag(t))],
      [["ecc.errors.corrected.volatile.total"], (r, t) => (r.eccCorrectedVolatile = count(t))],
      [["ecc.errors.uncorrected.volatile.total"], (r, t) => (r.eccUncorrectedVolatile = count(t))],
      [["ecc.errors.corrected.aggregate.total"], (r, t) => (r.eccCorrectedAggregate = count(t))],
      [["ecc.errors.uncorrected.aggregate.total"], (r, t) => (r.eccUncorrectedAggregate = count(t))],
      [
        ["ecc.errors.uncorrected.aggregate.sram.thresholdExceeded"],
        (r, t) => (r.eccSramThresholdExceeded = flag(t)),
      ],
      [["remapped_rows.correctable", "remapped_rows.sbe"], (r, t) => (r.remappedRowsCorrectable = count(t))],
      [
        ["remapped_rows.uncorrectable", "remapped_rows.dbe"],
        (r, t) => (r.remappedRowsUncorrectable = count(t)),
      ],
      [["remapped_rows.pending"], (r, t) => (r.remappedRowsPending = flag(t))],
      [["remapped_rows.failure"], (r, t) => (r.remappedRowsFailure = flag(t))],
      [["retired_pages.pending"], (r, t) => (r.retiredPagesPending = flag(t))],
      [["gpu_recovery_action"], (r, t) => (r.recoveryAction = told(t))],
      [["mig.mode.current"], (r, t) => (r.migMode = told(t))],
      [["mig.mode.pending"], (r, t) => (r.migPending = told(t))],
    ] as [names: string[], setter: Setter][]
  ).flatMap(([names, setter]) => names.map((name): [string, Setter] => [name.toLowerCase(), setter])),
);

/** A row longer than this is not nvidia-smi's; every field of the newest driver makes 4 kB. */
export const maxRowLength = 64 * 1024;

/** Splits a list of fields as given on a command line: "index, uuid, name". */
export function parseFieldList(list: string): string[] {
  return list
    .split(",")
    .map((field) => field.trim())
    .filter((field) => field !== "");
}

/**
 * Reads one row of `--query-gpu=<fields> --format=csv`, with units or without. Undefined when the row
 * cannot be one: another number of values than fields (half a line, an error message, the header).
 */
export function parseCsvRow(fields: readonly string[], line: string): GpuReading | undefined {
  if (line.length > maxRowLength) return undefined;
  const values = splitRow(line, fields);
  if (values === undefined || isHeader(fields, values)) return undefined;
  const reading: GpuReading = {};
  fields.forEach((field, position) => {
    const text = cleanText(values[position] ?? "");
    fieldSetters.get(field.toLowerCase())?.(reading, text);
    if (saysGpuLost(text)) reading.lost = true;
    if (saysGpuRequiresReset(text)) reading.requiresReset = true;
  });
  return reading;
}

/** Reads a whole CSV file; rows that are none are counted, not guessed at. */
export function parseCsvText(
  fields: readonly string[],
  text: string,
): { readonly gpus: GpuReading[]; readonly unreadableRows: number } {
  const gpus: GpuReading[] = [];
  let unreadableRows = 0;
  let first = true;
  for (const line of text.split(/\r?\n/)) {
    if (line.trim() === "") continue;
    const header = first && isHeader(fields, splitRow(line, fields) ?? []);
    first = false;
    if (header) continue;
    const reading = parseCsvRow(fields, line);
    if (reading === undefined) unreadableRows += 1;
    else gpus.push(reading);
  }
  return { gpus, unreadableRows };
}

/**
 * nvidia-smi quotes nothing, and a list of clock reasons or a product name may hold ", ". Where there are
 * too many values the surplus is given to the name, the only free text among the fields.
 */
function splitRow(line: string, fields: readonly string[]): string[] | undefined {
  const values = line.split(",").map((value) => value.trim());
  const surplus = values.length - fields.length;
  if (surplus === 0) return values;
  const name = fields.findIndex((field) => field === "name" || field === "gpu_name");
  if (surplus < 0 || name < 0) return undefined;
  values.splice(name, surplus + 1, values.slice(name, name + surplus + 1).join(", "));
  return values;
}

function isHeader(fields: readonly string[], values: readonly string[]): boolean {
  const bare = values.map((value) => value.replace(/\s*\[[^\]]*\]$/, "").toLowerCase());
  return (
    values.length === fields.length &&
    fields.every((field, position) => {
      const value = bare[position] ?? "";
      const wanted = field.toLowerCase();
      return (
        value === wanted ||
        // An alias is printed by its main name.
        (fieldSetters.has(value) && fieldSetters.get(value) === fieldSetters.get(wanted))
      );
    })
  );
}
