/**
 * The document of `nvidia-smi -q` as a tree, with the layout of each driver generation: which elements exist,
 * in which order. `xml.ts` and `text.ts` print it.
 */
import { isReasonActive } from "./fields.ts";
import type { DriverGeneration } from "./models.ts";
import type { GpuReading } from "./readings.ts";

export interface Node {
  readonly tag: string;
  readonly value: string | readonly Node[];
}

export const node = (tag: string, value: string | number | readonly Node[]): Node => ({
  tag,
  value: typeof value === "number" ? String(value) : value,
});

const na = "N/A";
const deprecated = "Requested functionality has been deprecated";
const mhz = (value: number): string => `${value} MHz`;
const yesNo = (value: boolean): string => (value ? "Yes" : "No");
const watts = (value: number): string => `${value.toFixed(2)} W`;
const mib = (value: number): string => `${value} MiB`;
const when = (condition: boolean, ...nodes: Node[]): readonly Node[] => (condition ? nodes : []);
const allNa = (...tags: string[]): readonly Node[] => tags.map((tag) => node(tag, na));

function pciSection(r: GpuReading, major: number): Node {
  const [domain = "", bus = "", device = ""] = r.identity.pciBusId.split(/[:.]/);
  const generation = r.model.pcieGeneration;
  const atomics = [
    node("atomic_caps_outbound", r.model.atomicCapabilities),
    node("atomic_caps_inbound", r.model.atomicCapabilities),
  ];
  return node("pci", [
    node("pci_bus", bus),
    node("pci_device", device),
    node("pci_domain", domain.slice(-4)),
    ...when(major >= 570, node("pci_base_class", "3"), node("pci_sub_class", "2")),
    node("pci_device_id", r.model.pciDeviceId),
    node("pci_bus_id", r.identity.pciBusId),
    node("pci_sub_system_id", r.model.pciSubSystemId),
    node("pci_gpu_link_info", [
      node("pcie_gen", [
        node("max_link_gen", generation),
        node("current_link_gen", generation),
        node("device_current_link_gen", generation),
        node("max_device_link_gen", generation),
        node("max_host_link_gen", major >= 580 ? na : generation),
      ]),
      node("link_widths", [node("max_link_width", "16x"), node("current_link_width", "16x")]),
    ]),
    node("pci_bridge_chip", allNa("bridge_chip_type", "bridge_chip_fw")),
    node("replay_counter", 0),
    node("replay_rollover_counter", 0),
    node("tx_util", `${500 + r.utilization * 4000} KB/s`),
    node("rx_util", `${450 + r.utilization * 6000} KB/s`),
    ...(major >= 570 ? atomics : atomics.toReversed()),
  ]);
}

function eventReasons(r: GpuReading): Node {
  return node(
    "clocks_event_reasons",
    [
      "gpu_idle",
      "applications_clocks_setting",
      "sw_power_cap",
      "hw_slowdown",
      "hw_thermal_slowdown",
      "hw_power_brake_slowdown",
      "sync_boost",
      "sw_thermal_slowdown",
      "display_clocks_setting",
    ].map((reason) =>
      node(`clocks_event_reason_${reason}`, isReasonActive(r, reason) ? "Active" : "Not Active"),
    ),
  );
}

function eventReasonCounters(r: GpuReading): Node {
  const counter = (tag: string, reason: string): Node =>
    node(`clocks_event_reasons_counters_${tag}`, `${isReasonActive(r, reason) ? r.throttledUs : 0} us`);
  return node("clocks_event_reasons_counters", [
    counter("sw_power_cap", "sw_power_cap"),
    counter("sync_boost", "sync_boost"),
    counter("sw_therm_slowdown", "sw_thermal_slowdown"),
    counter("hw_therm_slowdown", "hw_thermal_slowdown"),
    counter("hw_power_brake", "hw_power_brake_slowdown"),
  ]);
}

function eccErrors(r: GpuReading, major: number): Node {
  const counts = (): readonly Node[] => [
    node("sram_correctable", r.ecc.sramCorrected),
    ...(major >= 570
      ? [node("sram_uncorrectable_parity", r.ecc.sramUncorrected), node("sram_uncorrectable_secded", 0)]
      : [node("sram_uncorrectable", r.ecc.sramUncorrected)]),
    node("dram_correctable", r.ecc.dramCorrected),
    node("dram_uncorrectable", r.ecc.dramUncorrected),
  ];
  return node("ecc_errors", [
    node("volatile", counts()),
    node("aggregate", [
      ...counts(),
      ...when(major >= 570, node("sram_threshold_exceeded", yesNo(r.ecc.sramThresholdExceeded))),
    ]),
    ...when(
      major >= 570,
      node("aggregate_uncorrectable_sram_sources", [
        node("sram_l2", r.ecc.sramUncorrected),
        node("sram_sm", 0),
        node("sram_microcontroller", 0),
        node("sram_pcie", 0),
        node("sram_other", 0),
      ]),
    ),
    ...when(major >= 580, node("channel_repair_pending", "No"), node("tpc_repair_pending", "No")),
    ...when(major >= 595, node("unrepairable_memory", na)),
  ]);
}

function retiredPages(r: GpuReading): Node {
  const retires = r.model.remapBanks === undefined;
  const retirement = (tag: string): Node =>
    node(tag, [node("retired_count", retires ? "0" : na), node("retired_pagelist", retires ? [] : na)]);
  return node("retired_pages", [
    retirement("multiple_single_bit_retirement"),
    retirement("double_bit_retirement"),
    node("pending_blacklist", retires ? "No" : na),
    node("pending_retirement", retires ? "No" : na),
  ]);
}

function remappedRows(r: GpuReading, major: number): Node {
  const banks = r.model.remapBanks;
  if (banks === undefined) return node("remapped_rows", na);
  return node("remapped_rows", [
    node("remapped_row_corr", r.remapped.correctable),
    ...when(major >= 595, node("remapped_row_corr_inactive", 0)),
    node("remapped_row_unc", r.remapped.uncorrectable),
    ...when(major >= 595, node("remapped_row_unc_inactive", 0)),
    node("remapped_row_pending", yesNo(r.remapped.pending)),
    node("remapped_row_failure", yesNo(r.remapped.failure)),
    node("row_remapper_histogram", [
      node("row_remapper_histogram_max", `${banks} bank(s)`),
      ...["high", "partial", "low", "none"].map((level) =>
        node(`row_remapper_histogram_${level}`, "0 bank(s)"),
      ),
    ]),
  ]);
}

function temperature(r: GpuReading): Node {
  const limits = r.model.temperatureLimits;
  const memoryMaximum = r.model.memoryMaximumTemperature;
  const memoryLimit = memoryMaximum === undefined ? na : `${memoryMaximum} C`;
  const suffix = limits.kind === "tlimit" ? "_tlimit_threshold" : "_threshold";
  const gpuLimit = limits.kind === "tlimit" ? 0 : r.model.maximumOperatingTemperature;
  return node("temperature", [
    node("gpu_temp", `${r.temperature} C`),
    node("gpu_temp_tlimit", limits.kind === "tlimit" ? `${limits.base - r.temperature} C` : na),
    node(`gpu_temp_max${suffix}`, `${limits.shutdown} C`),
    node(`gpu_temp_slow${suffix}`, `${limits.slowdown} C`),
    node(`gpu_temp_max_gpu${suffix}`, `${gpuLimit} C`),
    node("gpu_target_temperature", na),
    node("memory_temp", r.model.hasMemoryTemperature ? `${r.memoryTemperature} C` : na),
    node(`gpu_temp_max_mem${suffix}`, memoryLimit),
  ]);
}

function power(r: GpuReading, major: number): readonly Node[] {
  const state = major >= 590 ? deprecated : r.performanceState;
  const draw = (average: string, instant: string): readonly Node[] =>
    major >= 570
      ? [node("average_power_draw", average), node("instant_power_draw", instant)]
      : [node("power_draw", average)];
  const limit = watts(r.model.powerLimitWatts);
  return [
    node("gpu_power_readings", [
      node("power_state", state),
      ...draw(watts(r.powerAverageWatts), watts(r.powerInstantWatts)),
      node("current_power_limit", limit),
      node("requested_power_limit", limit),
      node("default_power_limit", limit),
      node("min_power_limit", watts(r.model.powerMinimumWatts)),
      node("max_power_limit", limit),
    ]),
    ...when(
      major >= 570,
      node("gpu_memory_power_readings", [
        node("average_power_draw", r.model.memoryPower ? watts(r.powerAverageWatts * 0.3) : na),
        node("instant_power_draw", na),
      ]),
    ),
    node("module_power_readings", [
      node("power_state", state),
      ...draw(na, na),
      ...allNa(
        "current_power_limit",
        "requested_power_limit",
        "default_power_limit",
        "min_power_limit",
        "max_power_limit",
      ),
    ]),
    ...when(
      major >= 570,
      node("power_smoothing", r.model.powerSmoothing),
      node("power_profiles", allNa("power_profile_requested_profiles", "power_profile_enforced_profiles")),
    ),
    ...when(major >= 590, node("edpp_multiplier", r.model.edppMultiplier ? "100.00%" : na)),
  ];
}

function clocks(r: GpuReading, major: number): readonly Node[] {
  const m = r.model;
  const applications = (tag: string): Node =>
    node(tag, [
      node("graphics_clock", major >= 590 ? deprecated : mhz(m.clockMaximum)),
      node("mem_clock", major >= 590 ? deprecated : mhz(m.memoryClock)),
    ]);
  return [
    node("clocks", [
      node("graphics_clock", mhz(r.graphicsClock)),
      node("sm_clock", mhz(r.graphicsClock)),
      node("mem_clock", mhz(m.memoryClock)),
      node("video_clock", mhz(r.videoClock)),
    ]),
    applications("applications_clocks"),
    applications("default_applications_clocks"),
    node("deferred_clocks", allNa("mem_clock")),
    node("max_clocks", [
      node("graphics_clock", mhz(m.clockMaximum)),
      node("sm_clock", mhz(m.clockMaximum)),
      node("mem_clock", mhz(m.memoryClock)),
      node("video_clock", mhz(m.videoClockMaximum)),
    ]),
    node("max_customer_boost_clocks", [node("graphics_clock", mhz(m.clockMaximum))]),
    node("clock_policy", allNa("auto_boost", "auto_boost_default")),
    ...when(major < 580, node("voltage", [node("graphics_volt", m.graphicsVoltage)])),
  ];
}

function fabric(r: GpuReading, major: number): Node {
  const has = r.model.fabric;
  const health = r.model.fabricHealth;
  return node("fabric", [
    node("state", has ? "Completed" : na),
    node("status", has ? "Success" : na),
    ...when(
      major >= 570,
      node("cliqueId", has ? "0" : na),
      node("clusterUuid", has ? "00000000-0000-0000-0000-000000000000" : na),
      node("health", [
        ...when(major >= 580, node("summary", health ? "Healthy" : na)),
        ...allNa("bandwidth", "route_recovery_in_progress", "route_unhealthy"),
        node("access_timeout_recovery", health ? "False" : na),
        ...when(major >= 580, node("incorrect_configuration", na)),
        ...when(major >= 595, node("partition_assigned", na)),
      ]),
    ),
  ]);
}

function supportedClocks(r: GpuReading): Node {
  const graphics: Node[] = [];
  for (let clock = r.model.clockMaximum; clock >= r.model.clockIdle; clock -= r.model.clockStep) {
    graphics.push(node("supported_graphics_clock", `${clock} MHz`));
  }
  return node("supported_clocks", [
    node("supported_mem_clock", [node("value", `${r.model.memoryClock} MHz`), ...graphics]),
  ]);
}

function processes(r: GpuReading): Node {
  return node(
    "processes",
    r.processes.map((process) =>
      node("process_info", [
        ...allNa("gpu_instance_id", "compute_instance_id"),
        node("pid", process.pid),
        node("type", "C"),
        node("process_name", process.name),
        node("used_memory", mib(process.usedMib)),
      ]),
    ),
  );
}

function memory(r: GpuReading): readonly Node[] {
  return [
    node("fb_memory_usage", [
      node("total", mib(r.model.memoryTotalMib)),
      node("reserved", mib(r.model.memoryReservedMib)),
      node("used", mib(r.memoryUsedMib)),
      node("free", mib(r.memoryFreeMib)),
    ]),
    node("bar1_memory_usage", [
      node("total", mib(r.model.bar1TotalMib)),
      node("used", mib(1)),
      node("free", mib(r.model.bar1TotalMib - 1)),
    ]),
    node("cc_protected_memory_usage", [node("total", mib(0)), node("used", mib(0)), node("free", mib(0))]),
  ];
}

function identity(r: GpuReading, driver: DriverGeneration): readonly Node[] {
  const major = driver.major;
  const m = r.model;
  const platform = (tag: string, value: string): Node => node(tag, m.platformKnown ? value : na);
  const virtualization = node("gpu_virtualization_mode", [
    node("virtualization_mode", "None"),
    node("host_vgpu_mode", na),
    ...when(major >= 570, node("vgpu_heterogeneous_mode", na)),
  ]);
  const gsp = node("gsp_firmware_version", driver.version);
  const operationMode = node("gpu_operation_mode", allNa("current_gom", "pending_gom"));
  const resetStatus = node("gpu_reset_status", [
    node("reset_required", major >= 570 ? deprecated : yesNo(r.resetRequired)),
    node(
      "drain_and_reset_recommended",
      major >= 570 ? deprecated : yesNo(r.recoveryAction === "Drain and Reset"),
    ),
  ]);
  return [
    node("serial", r.identity.serial),
    node("uuid", r.identity.uuid),
    ...when(major >= 580, node("pdi", `0x${r.identity.pdi}`)),
    node("minor_number", r.identity.minorNumber),
    node("vbios_version", m.vbios),
    node("multigpu_board", "No"),
    node("board_id", `0x${Number.parseInt(r.identity.pciBusId.slice(9, 11), 16).toString(16)}00`),
    node("board_part_number", m.boardPartNumber),
    node("gpu_part_number", m.gpuPartNumber),
    node("gpu_fru_part_number", na),
    ...when(major < 570, node("gpu_module_id", r.identity.index + 1)),
    ...when(
      major >= 570,
      node("platformInfo", [
        platform("chassis_serial_number", ""),
        ...allNa("slot_number", "tray_index"),
        platform("host_id", "1"),
        platform("peer_type", "Switch Connected"),
        node("module_id", r.identity.index + 1),
        platform("gpu_fabric_guid", `0x${(r.identity.index + 1).toString(16).padStart(16, "0")}`),
      ]),
    ),
    node("inforom_version", [
      node("img_version", m.inforomImage),
      node("oem_object", m.inforomOem),
      node("ecc_object", m.inforomEcc),
      node("pwr_object", na),
    ]),
    ...when(
      major >= 570,
      node("inforom_bbx_flush", [
        node("latest_timestamp", m.hasInforomFlush ? "2026/01/01 00:00:00.000" : na),
        node("latest_duration", m.hasInforomFlush ? "90000 us" : na),
      ]),
    ),
    operationMode,
    ...(major >= 570
      ? [
          node("c2c_mode", m.c2c ? "Disabled" : na),
          virtualization,
          ...when(major < 580, resetStatus),
          node("gpu_recovery_action", r.recoveryAction),
          gsp,
        ]
      : [gsp, virtualization, resetStatus]),
    node("ibmnpu", allNa("relaxed_ordering_mode")),
  ];
}

/** The children of one `gpu` element. */
export function gpuDocument(r: GpuReading, driver: DriverGeneration): readonly Node[] {
  const major = driver.major;
  const mig = r.model.mig ? "Disabled" : na;
  return [
    node("product_name", r.model.name),
    node("product_brand", "NVIDIA"),
    node("product_architecture", r.model.architecture),
    node("display_mode", major >= 580 ? deprecated : "Enabled"),
    ...when(major >= 580, node("display_attached", "Yes")),
    node("display_active", "Disabled"),
    node("persistence_mode", "Enabled"),
    node("addressing_mode", r.model.addressingMode),
    node("mig_mode", [node("current_mig", mig), node("pending_mig", mig)]),
    node("mig_devices", [node("", "None")]),
    node("accounting_mode", "Disabled"),
    node("accounting_mode_buffer_size", 4000),
    node("driver_model", allNa("current_dm", "pending_dm")),
    ...identity(r, driver),
    pciSection(r, major),
    node("fan_speed", na),
    node("performance_state", r.performanceState),
    eventReasons(r),
    ...when(major >= 580, eventReasonCounters(r)),
    ...when(major >= 570, node("sparse_operation_mode", r.model.sparseOperationMode ? "Disabled" : na)),
    ...memory(r),
    node("compute_mode", "Default"),
    node("utilization", [
      node("gpu_util", `${r.utilization} %`),
      node("memory_util", `${r.memoryUtilization} %`),
      ...["encoder", "decoder", "jpeg", "ofa"].map((engine) => node(`${engine}_util`, "0 %")),
    ]),
    ...["encoder_stats", "fbc_stats"].map((tag) =>
      node(tag, [node("session_count", 0), node("average_fps", 0), node("average_latency", 0)]),
    ),
    ...when(
      major >= 570,
      node("dram_encryption_mode", allNa("current_dram_encryption", "pending_dram_encryption")),
    ),
    node("ecc_mode", [node("current_ecc", "Enabled"), node("pending_ecc", "Enabled")]),
    eccErrors(r, major),
    retiredPages(r),
    remappedRows(r, major),
    temperature(r),
    node("supported_gpu_target_temp", allNa("gpu_target_temp_min", "gpu_target_temp_max")),
    ...power(r, major),
    ...clocks(r, major),
    fabric(r, major),
    supportedClocks(r),
    processes(r),
    node("accounted_processes", []),
    ...when(major >= 570, node("capabilities", [node("egm", "disabled")])),
  ];
}

/** Replaces every value a lost GPU can no longer give; what the driver remembers stays. */
export function lostDocument(nodes: readonly Node[]): readonly Node[] {
  const remembered = new Set([
    "product_name",
    "product_brand",
    "uuid",
    "pci_bus_id",
    "minor_number",
    "serial",
  ]);
  return nodes.map((entry) =>
    typeof entry.value === "string"
      ? remembered.has(entry.tag)
        ? entry
        : node(entry.tag, "GPU is lost")
      : node(entry.tag, lostDocument(entry.value)),
  );
}
