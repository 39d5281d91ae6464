/**
 * Every field of `--query-gpu`, in the order of `--help-query-gpu`, with the driver that brought it. The order
 * and the forms of "not available" are those of the real tool: "[N/A]" where the driver says not supported,
 * a bare "N/A" where the tool prints the text itself.
 */
import { throttleReasons } from "./faults.ts";
import type { DriverGeneration } from "./models.ts";
import type { GpuReading } from "./readings.ts";

export interface FieldContext {
  readonly driver: DriverGeneration;
  readonly count: number;
}

export interface QueryField {
  readonly name: string;
  readonly aliases: readonly string[];
  /** As in the header, e.g. "MiB"; undefined when the column has none. */
  readonly unit: string | undefined;
  readonly description: string;
  readonly since: number;
  /** The first driver without the field. */
  readonly until: number;
  /** A number gets the unit, a text is printed as it is. */
  readonly value: (reading: GpuReading, context: FieldContext) => number | string;
}

const notAvailable = "[N/A]";
const deprecated = "[Requested functionality has been deprecated]";
const never = Number.POSITIVE_INFINITY;

const fields: QueryField[] = [];

interface FieldOptions {
  readonly unit?: string;
  readonly alias?: string | readonly string[];
  readonly since?: number;
  readonly until?: number;
  readonly description?: string;
}

function add(name: string, value: QueryField["value"] | string | number, options: FieldOptions = {}): void {
  fields.push({
    name,
    aliases: typeof options.alias === "string" ? [options.alias] : (options.alias ?? []),
    unit: options.unit,
    description: options.description ?? `The value of ${name.replaceAll(/[._]/g, " ")}.`,
    since: options.since ?? 0,
    until: options.until ?? never,
    value: typeof value === "function" ? value : () => value,
  });
}

const two = (value: number): string => value.toFixed(2);
const yesNo = (value: boolean): string => (value ? "Yes" : "No");
const pad = (value: number, size: number): string => value.toString().padStart(size, "0");

/** YYYY/MM/DD HH:MM:SS.mmm in local time, the form of the CSV output. */
export function csvTimestamp(atMs: number): string {
  const d = new Date(atMs);
  return (
    `${d.getFullYear()}/${pad(d.getMonth() + 1, 2)}/${pad(d.getDate(), 2)} ` +
    `${pad(d.getHours(), 2)}:${pad(d.getMinutes(), 2)}:${pad(d.getSeconds(), 2)}.${pad(d.getMilliseconds(), 3)}`
  );
}

const reasonBits: Readonly<Record<string, number>> = {
  gpu_idle: 0x1,
  applications_clocks_setting: 0x2,
  sw_power_cap: 0x4,
  hw_slowdown: 0x8,
  sync_boost: 0x10,
  sw_thermal_slowdown: 0x20,
  hw_thermal_slowdown: 0x40,
  hw_power_brake_slowdown: 0x80,
};

/** Whether the tool shows this reason as active. */
export function isReasonActive(reading: GpuReading, reason: string): boolean {
  if (reason === "gpu_idle") return reading.utilization === 0;
  return (reading.throttle as readonly string[]).includes(reason);
}

function reasonMask(reading: GpuReading): string {
  const mask = Object.entries(reasonBits).reduce(
    (sum, [reason, bit]) => (isReasonActive(reading, reason) ? sum | bit : sum),
    0,
  );
  return `0x${mask.toString(16).toUpperCase().padStart(16, "0")}`;
}

const pci = (reading: GpuReading): { domain: string; bus: string; device: string } => {
  const [domain = "", bus = "", device = ""] = reading.identity.pciBusId.split(/[:.]/);
  return { domain, bus, device };
};

add("timestamp", (r) => csvTimestamp(r.atMs), {
  description: 'The timestamp of when the query was made in format "YYYY/MM/DD HH:MM:SS.msec".',
});
add("driver_version", (_, c) => c.driver.version);
add("kmd_version", (_, c) => c.driver.version, { since: 595 });
add("vgpu_driver_capability.heterogenous_multivGPU", notAvailable);
add("count", (_, c) => c.count);
add("name", (r) => r.model.name, { alias: "gpu_name" });
add("serial", (r) => r.identity.serial, { alias: "gpu_serial" });
add("uuid", (r) => r.identity.uuid, { alias: "gpu_uuid" });
add("pci.bus_id", (r) => r.identity.pciBusId, { alias: "gpu_bus_id" });
add("pci.domain", (r) => `0x${pci(r).domain.slice(-4)}`);
add("pci.bus", (r) => `0x${pci(r).bus}`);
add("pci.device", (r) => `0x${pci(r).device}`);
add("pci.baseClass", "0x3", { since: 550 });
add("pci.subClass", "0x2", { since: 550 });
add("pci.device_id", (r) => `0x${r.model.pciDeviceId}`);
add("pci.sub_device_id", (r) => `0x${r.model.pciSubSystemId}`);
for (const name of [
  "fractional_multiVgpu",
  "heterogeneous_timeSlice_profile",
  "heterogeneous_timeSlice_sizes",
  "homogeneous_placements",
  "mig_timeSlicing",
  "mig_timeSlicing_mode",
]) {
  const since = name.startsWith("homogeneous") || name.startsWith("mig") ? 570 : 0;
  add(`vgpu_device_capability.${name}`, notAvailable, { since });
}
add("pcie.link.gen.current", (r) => r.model.pcieGeneration);
add("pcie.link.gen.gpucurrent", (r) => r.model.pcieGeneration);
add("pcie.link.gen.max", (r) => r.model.pcieGeneration);
add("pcie.link.gen.gpumax", (r) => r.model.pcieGeneration);
add("pcie.link.gen.hostmax", (r, c) => (c.driver.major >= 580 ? notAvailable : r.model.pcieGeneration));
add("pcie.link.width.current", 16);
add("pcie.link.width.max", 16);
add("index", (r) => r.identity.index);
add("display_mode", (_, c) => (c.driver.major >= 580 ? deprecated : "Enabled"));
add("display_attached", "Yes", { since: 580 });
add("display_active", "Disabled");
add("persistence_mode", "Enabled");
add("addressing_mode", (r) => r.model.addressingMode);
add("accounting.mode", "Disabled");
add("accounting.buffer_size", 4000);
add("driver_model.current", notAvailable);
add("driver_model.pending", notAvailable);
add("vbios_version", (r) => r.model.vbios);
add("inforom.img", (r) => r.model.inforomImage, { alias: "inforom.image" });
add("inforom.oem", (r) => r.model.inforomOem);
add("inforom.ecc", (r) => r.model.inforomEcc);
add("inforom.pwr", notAvailable, { alias: "inforom.power" });
add("inforom.checksum_validation", "valid", { since: 560 });
add("gpu_recovery_action", (r) => r.recoveryAction, { since: 560 });
add("gom.current", notAvailable, { alias: "gpu_operation_mode.current" });
add("gom.pending", notAvailable, { alias: "gpu_operation_mode.pending" });
add("fan.speed", notAvailable, { unit: "%" });
add("pstate", (r) => r.performanceState);
add("clocks_event_reasons.supported", "0x00000000000001FF", { alias: "clocks_throttle_reasons.supported" });
add("clocks_event_reasons.active", reasonMask, { alias: "clocks_throttle_reasons.active" });
for (const reason of ["gpu_idle", ...throttleReasons]) {
  add(`clocks_event_reasons.${reason}`, (r) => (isReasonActive(r, reason) ? "Active" : "Not Active"), {
    alias: `clocks_throttle_reasons.${reason}`,
  });
}
for (const reason of [
  "sw_power_cap",
  "sync_boost",
  "sw_thermal_slowdown",
  "hw_thermal_slowdown",
  "hw_power_brake_slowdown",
]) {
  add(`clocks_event_reasons_counters.${reason}`, (r) => (isReasonActive(r, reason) ? r.throttledUs : 0), {
    unit: "us",
    since: 560,
  });
}
add("memory.total", (r) => r.model.memoryTotalMib, { unit: "MiB" });
add("memory.reserved", (r) => r.model.memoryReservedMib, { unit: "MiB" });
add("memory.used", (r) => r.memoryUsedMib, { unit: "MiB" });
add("memory.free", (r) => r.memoryFreeMib, { unit: "MiB" });
add("compute_mode", "Default");
add("compute_cap", (r) => r.model.computeCapability);
add("utilization.gpu", (r) => r.utilization, { unit: "%" });
add("utilization.memory", (r) => r.memoryUtilization, { unit: "%" });
for (const engine of ["encoder", "decoder", "jpeg", "ofa"]) add(`utilization.${engine}`, 0, { unit: "%" });
for (const stat of ["sessionCount", "averageFps", "averageLatency"]) add(`encoder.stats.${stat}`, 0);
add("dramEncryption.mode.current", notAvailable, { since: 570 });
add("dramEncryption.mode.pending", notAvailable, { since: 570 });
add("ecc.mode.current", "Enabled");
add("ecc.mode.pending", "Enabled");
for (const kind of ["corrected", "uncorrected"] as const) {
  const dram = (r: GpuReading): number =>
    kind === "corrected" ? r.ecc.dramCorrected : r.ecc.dramUncorrected;
  const sram = (r: GpuReading): number =>
    kind === "corrected" ? r.ecc.sramCorrected : r.ecc.sramUncorrected;
  for (const span of ["volatile", "aggregate"]) {
    const prefix = `ecc.errors.${kind}.${span}`;
    add(`${prefix}.device_memory`, dram);
    add(`${prefix}.dram`, dram);
    for (const part of ["register_file", "l1_cache", "l2_cache", "texture_memory", "cbu"]) {
      add(`${prefix}.${part}`, notAvailable);
    }
    add(`${prefix}.sram`, sram);
    add(`${prefix}.total`, (r) => dram(r) + sram(r));
  }
}
for (const span of ["volatile", "aggregate"]) {
  add(`ecc.errors.uncorrected.${span}.sram.parity`, (r) => r.ecc.sramUncorrected, { since: 560 });
  add(`ecc.errors.uncorrected.${span}.sram.secded`, 0, { since: 560 });
}
add("ecc.errors.uncorrected.aggregate.sram.thresholdExceeded", (r) => yesNo(r.ecc.sramThresholdExceeded), {
  since: 560,
});
for (const source of ["l2", "sm", "mcu", "pcie", "other"]) {
  add(
    `ecc.errors.uncorrected.aggregate.sram.${source}`,
    (r) => (source === "l2" ? r.ecc.sramUncorrected : 0),
    { since: 560 },
  );
}
const retiredOr =
  (value: number | string) =>
  (r: GpuReading): number | string =>
    r.model.remapBanks === undefined ? value : notAvailable;
const remapOr =
  (value: (r: GpuReading) => number | string) =>
  (r: GpuReading): number | string =>
    r.model.remapBanks === undefined ? notAvailable : value(r);
add("retired_pages.single_bit_ecc.count", retiredOr(0), { alias: "retired_pages.sbe" });
add("retired_pages.double_bit.count", retiredOr(0), { alias: "retired_pages.dbe" });
add("retired_pages.pending", retiredOr("No"));
add(
  "remapped_rows.correctable",
  remapOr((r) => r.remapped.correctable),
  { alias: "remapped_rows.sbe" },
);
add(
  "remapped_rows.correctable_inactive",
  remapOr(() => 0),
  { since: 595 },
);
add(
  "remapped_rows.uncorrectable",
  remapOr((r) => r.remapped.uncorrectable),
  { alias: "remapped_rows.dbe" },
);
add(
  "remapped_rows.uncorrectable_inactive",
  remapOr(() => 0),
  { since: 595 },
);
add(
  "remapped_rows.pending",
  remapOr((r) => yesNo(r.remapped.pending)),
);
add(
  "remapped_rows.failure",
  remapOr((r) => yesNo(r.remapped.failure)),
);
for (const level of ["max", "high", "partial", "low", "none"]) {
  add(
    `remapped_rows.histogram.${level}`,
    remapOr((r) => (level === "max" ? (r.model.remapBanks ?? 0) : 0)),
    { since: 550 },
  );
}
add("temperature.gpu", (r) => r.temperature);
add("temperature.gpu.tlimit", (r) =>
  r.model.temperatureLimits.kind === "tlimit" ? r.model.temperatureLimits.base - r.temperature : "N/A",
);
add("temperature.memory", (r) => (r.model.hasMemoryTemperature ? r.memoryTemperature : "N/A"));
add("power.management", (_, c) => (c.driver.major >= 590 ? deprecated : "Enabled"));
add("power.draw", (r) => two(r.powerAverageWatts), { unit: "W" });
add("power.draw.average", (r) => two(r.powerAverageWatts), { unit: "W", alias: "gpu.power.draw.average" });
add("power.draw.instant", (r) => two(r.powerInstantWatts), { unit: "W", alias: "gpu.power.draw.instant" });
add("power.limit", (r) => two(r.model.powerLimitWatts), { unit: "W", alias: "gpu.power.requested_limit" });
add("enforced.power.limit", (r) => two(r.model.powerLimitWatts), {
  unit: "W",
  alias: "gpu.power.current_limit",
});
add("power.default_limit", (r) => two(r.model.powerLimitWatts), {
  unit: "W",
  alias: "gpu.power.default_limit",
});
add("power.min_limit", (r) => two(r.model.powerMinimumWatts), { unit: "W", alias: "gpu.power.min_limit" });
add("power.max_limit", (r) => two(r.model.powerLimitWatts), { unit: "W", alias: "gpu.power.max_limit" });
for (const name of [
  "draw.average",
  "draw.instant",
  "limit",
  "enforced.power.limit",
  "default_limit",
  "min_limit",
  "max_limit",
]) {
  const full = name === "enforced.power.limit" ? "module.enforced.power.limit" : `module.power.${name}`;
  const alias =
    name === "limit"
      ? "module.power.requested_limit"
      : name === "enforced.power.limit"
        ? "module.power.current_limit"
        : [];
  add(full, notAvailable, { unit: "W", alias, since: 545 });
}
for (const [name, unit] of [
  ["delayed_power_smoothing_supported", ""],
  ["primary_power_floor", "W"],
  ["secondary_power_floor", "W"],
  ["min_primary_floor_activation_offset", "W"],
  ["min_primary_floor_activation_point", "W"],
  ["window_multiplier", "ms"],
  ["curr_profile.secondary_power_floor", "W"],
  ["curr_profile.primary_floor_act_window_multiplier", ""],
  ["curr_profile.primary_floor_tar_window_multiplier", ""],
  ["curr_profile.primary_floor_act_offset", "W"],
  ["admin_override.secondary_power_floor", "W"],
  ["admin_override.primary_floor_act_window_multiplier", ""],
  ["admin_override.primary_floor_tar_window_multiplier", ""],
  ["admin_override.primary_floor_act_offset", "W"],
] as const) {
  add(
    `power_smoothing.${name}`,
    (r) => (r.model.powerSmoothing === "N/A" ? notAvailable : `[${r.model.powerSmoothing}]`),
    { ...(unit ? { unit } : {}), since: 590, until: 595 },
  );
}
add("edpp_multiplier", (r) => (r.model.edppMultiplier ? "100.00" : notAvailable), { unit: "%", since: 590 });
add("clocks.current.graphics", (r) => r.graphicsClock, { unit: "MHz", alias: "clocks.gr" });
add("clocks.current.sm", (r) => r.graphicsClock, { unit: "MHz", alias: "clocks.sm" });
add("clocks.current.memory", (r) => r.model.memoryClock, { unit: "MHz", alias: "clocks.mem" });
add("clocks.current.video", (r) => r.videoClock, { unit: "MHz", alias: "clocks.video" });
for (const set of ["applications", "default_applications"]) {
  add(`clocks.${set}.graphics`, (r, c) => (c.driver.major >= 590 ? deprecated : r.model.clockMaximum), {
    unit: "MHz",
    alias: `clocks.${set}.gr`,
  });
  add(`clocks.${set}.memory`, (r, c) => (c.driver.major >= 590 ? deprecated : r.model.memoryClock), {
    unit: "MHz",
    alias: `clocks.${set}.mem`,
  });
}
add("clocks.max.graphics", (r) => r.model.clockMaximum, { unit: "MHz", alias: "clocks.max.gr" });
// The tool names the same word twice in its help.
add("clocks.max.sm", (r) => r.model.clockMaximum, { unit: "MHz", alias: "clocks.max.sm" });
add("clocks.max.memory", (r) => r.model.memoryClock, { unit: "MHz", alias: "clocks.max.mem" });
add("mig.mode.current", (r) => (r.model.mig ? "Disabled" : notAvailable));
add("mig.mode.pending", (r) => (r.model.mig ? "Disabled" : notAvailable));
add("gsp.mode.current", "Enabled");
add("gsp.mode.default", "Enabled");
add("c2c.mode", (r) => (r.model.c2c ? "Disabled" : notAvailable), { since: 545 });
add("protected_memory.total", 0, { unit: "MiB" });
add("protected_memory.used", 0, { unit: "MiB" });
add("protected_memory.free", 0, { unit: "MiB" });
const fabricOr =
  (value: string) =>
  (r: GpuReading): string =>
    r.model.fabric ? value : "N/A";
add("fabric.state", fabricOr("Completed"));
add("fabric.status", fabricOr("Success"));
add("fabric.cliqueId", fabricOr("0"), { since: 560 });
add("fabric.clusterUuid", fabricOr("00000000-0000-0000-0000-000000000000"), { since: 560 });
for (const [name, healthy, since] of [
  ["summary", "Healthy", 580],
  ["bandwidth", "N/A", 560],
  ["route_recovery_in_progress", "N/A", 560],
  ["route_unhealthy", "N/A", 560],
  ["access_timeout_recovery", "False", 560],
  ["incorrect_configuration", "N/A", 580],
  ["partition_assigned", "N/A", 595],
] as const) {
  add(`fabric.health.${name}`, (r) => (r.model.fabricHealth ? healthy : "N/A"), { since });
}
add("platform.chassis_serial_number", "", { since: 570 });
add("platform.slot_number", 0, { since: 570 });
add("platform.tray_index", 0, { since: 570 });
add("platform.host_id", 1, { since: 570 });
add("platform.peer_type", (r) => (r.model.platformKnown ? "Switch Connected" : "Direct Connected"), {
  since: 570,
});
add("platform.module_id", (r) => r.identity.index + 1, { since: 570 });
add("platform.gpu_fabric_guid", "0x0000000000000000", { since: 570 });
add("hostname", notAvailable, { since: 590 });

/** The fields this driver knows, in the tool's order. */
export function queryFields(driver: DriverGeneration): readonly QueryField[] {
  return fields.filter((field) => driver.major >= field.since && driver.major < field.until);
}

/** A name or alias to its field; undefined when this driver does not know it. */
export function findField(driver: DriverGeneration, name: string): QueryField | undefined {
  return queryFields(driver).find((field) => field.name === name || field.aliases.includes(name));
}

/** Fields that describe the device rather than ask it: they are answered also when the GPU is gone. */
const answeredWithoutDevice = new Set([
  "timestamp",
  "driver_version",
  "kmd_version",
  "count",
  "index",
  "name",
  "uuid",
  "pci.bus_id",
  "pci.domain",
  "pci.bus",
  "pci.device",
  "serial",
]);

/** One cell as it is printed. */
export function cell(
  field: QueryField,
  reading: GpuReading,
  context: FieldContext,
  withUnits: boolean,
): string {
  if (!answeredWithoutDevice.has(field.name)) {
    if (reading.lost === "fields") return "[GPU is lost]";
    if (reading.resetRequired && field.name !== "gpu_recovery_action") return "[GPU requires reset]";
  }
  const value = field.value(reading, context);
  const text = String(value);
  // "[" begins a form of "not available", which takes no unit.
  const takesUnit = withUnits && field.unit !== undefined && !text.startsWith("[") && text !== "N/A";
  return takesUnit ? `${text} ${field.unit}` : text;
}
