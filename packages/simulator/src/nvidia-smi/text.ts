/** The text forms of the simulated nvidia-smi: XML and plain printing of the document, lists, table, topology. */
import { gpuDocument, lostDocument, node, type Node } from "./document.ts";
import { queryFields } from "./fields.ts";
import type { DriverGeneration, GpuModel } from "./models.ts";
import type { GpuReading } from "./readings.ts";
import type { ServerDescription } from "./state.ts";

const days = ["Sun", "Mon", "Tue", "Wed", "Thu", "Fri", "Sat"];
const months = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];

const two = (value: number): string => String(value).padStart(2, "0");

/** The form of C's ctime, local time, without the line end. */
export function ctime(atMs: number): string {
  const d = new Date(atMs);
  return (
    `${days[d.getDay()]} ${months[d.getMonth()]} ${String(d.getDate()).padStart(2, " ")} ` +
    `${two(d.getHours())}:${two(d.getMinutes())}:${two(d.getSeconds())} ${d.getFullYear()}`
  );
}

const escapeXml = (text: string): string =>
  text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");

function xmlLines(entry: Node, depth: number, lines: string[]): void {
  const indent = "\t".repeat(depth);
  if (typeof entry.value === "string") {
    // A node without a tag is bare text.
    lines.push(
      entry.tag === ""
        ? `${indent}${entry.value}`
        : `${indent}<${entry.tag}>${escapeXml(entry.value)}</${entry.tag}>`,
    );
  } else {
    lines.push(`${indent}<${entry.tag}>`);
    for (const child of entry.value) xmlLines(child, depth + 1, lines);
    lines.push(`${indent}</${entry.tag}>`);
  }
}

function documentOf(reading: GpuReading, driver: DriverGeneration): readonly Node[] {
  const nodes = gpuDocument(reading, driver);
  return reading.lost === "fields" ? lostDocument(nodes) : nodes;
}

/** `nvidia-smi -q -x`. `attached` counts all GPUs, also when only some are printed. */
export function xmlDocument(
  readings: readonly GpuReading[],
  driver: DriverGeneration,
  attached: number,
  atMs: number,
): string {
  const lines = [
    '<?xml version="1.0" ?>',
    `<!DOCTYPE nvidia_smi_log SYSTEM "${driver.dtd}">`,
    "<nvidia_smi_log>",
  ];
  for (const entry of [
    node("timestamp", ctime(atMs)),
    node("driver_version", driver.version),
    node("cuda_version", driver.cudaVersion),
    node("attached_gpus", attached),
  ]) {
    xmlLines(entry, 1, lines);
  }
  for (const reading of readings) {
    lines.push(`\t<gpu id="${reading.identity.pciBusId}">`);
    for (const entry of documentOf(reading, driver)) xmlLines(entry, 2, lines);
    lines.push("\t</gpu>", "");
  }
  lines.push("</nvidia_smi_log>", "");
  return lines.join("\n");
}

const upperWords = new Set([
  "gpu",
  "uuid",
  "pci",
  "ecc",
  "fb",
  "mig",
  "cc",
  "sm",
  "sram",
  "dram",
  "vbios",
  "id",
  "gom",
]);

function plainLabel(tag: string): string {
  return tag
    .split("_")
    .map((word) =>
      upperWords.has(word) ? word.toUpperCase() : word.slice(0, 1).toUpperCase() + word.slice(1),
    )
    .join(" ");
}

const line = (label: string, value: string, depth: number): string =>
  `${" ".repeat(depth * 4)}${label}`.padEnd(51) + `: ${value}`;

/** `nvidia-smi -q`: the same document for people; labels follow the element names. */
export function plainDocument(
  readings: readonly GpuReading[],
  driver: DriverGeneration,
  attached: number,
  atMs: number,
): string {
  const lines = [
    "",
    "==============NVSMI LOG==============",
    "",
    line("Timestamp", ctime(atMs), 0),
    line("Driver Version", driver.version, 0),
    line("CUDA Version", driver.cudaVersion, 0),
    "",
    line("Attached GPUs", String(attached), 0),
  ];
  const print = (entry: Node, depth: number): void => {
    if (entry.tag === "supported_clocks") return;
    if (typeof entry.value === "string") {
      if (entry.tag !== "") lines.push(line(plainLabel(entry.tag), entry.value, depth));
    } else if (entry.value.length === 0) {
      lines.push(line(plainLabel(entry.tag), "None", depth));
    } else {
      lines.push(`${" ".repeat(depth * 4)}${plainLabel(entry.tag)}`);
      for (const child of entry.value) print(child, depth + 1);
    }
  };
  for (const reading of readings) {
    lines.push(`GPU ${reading.identity.pciBusId}`);
    for (const entry of documentOf(reading, driver)) print(entry, 1);
    lines.push("");
  }
  return `${lines.join("\n")}\n`;
}

/** `nvidia-smi -L`. */
export function listGpus(readings: readonly GpuReading[]): string {
  return readings
    .map((r) => `GPU ${r.identity.index}: ${r.model.name} (UUID: ${r.identity.uuid})\n`)
    .join("");
}

/** `nvidia-smi --version`. */
export function versionText(driver: DriverGeneration): string {
  return [
    `NVIDIA-SMI version  : ${driver.version}`,
    `NVML version        : ${driver.version.split(".").slice(0, 2).join(".")}`,
    `DRIVER version      : ${driver.version}`,
    `CUDA Version        : ${driver.cudaVersion}`,
    "",
  ].join("\n");
}

/** `nvidia-smi --help-query-gpu`. */
export function helpQueryGpu(driver: DriverGeneration): string {
  const entries = queryFields(driver).map(
    (field) =>
      `"${field.name}"${field.aliases.map((alias) => ` or "${alias}"`).join("")}\n${field.description}\n`,
  );
  return `List of valid properties to query for the switch "--query-gpu":\n\n${entries.join("\n")}\n\n`;
}

const topologyLegend = `
Legend:

  X    = Self
  SYS  = Connection traversing PCIe as well as the SMP interconnect between NUMA nodes (e.g., QPI/UPI)
  NODE = Connection traversing PCIe as well as the interconnect between PCIe Host Bridges within a NUMA node
  PHB  = Connection traversing PCIe as well as a PCIe Host Bridge (typically the CPU)
  PXB  = Connection traversing multiple PCIe bridges (without traversing the PCIe Host Bridge)
  PIX  = Connection traversing at most a single PCIe bridge
  NV#  = Connection traversing a bonded set of # NVLinks
`;

/** `nvidia-smi topo -m`, with the underline escapes the tool puts around its header also into a pipe. */
export function topologyMatrix(server: ServerDescription, model: GpuModel): string {
  const gpus = server.gpus;
  const coresPerNode = 56;
  const header = [...gpus.map((gpu) => `GPU${gpu.index}`), "CPU Affinity", "NUMA Affinity", "GPU NUMA ID"];
  const rows = gpus.map((from) => {
    const cells = gpus.map((to) => {
      if (from.index === to.index) return " X ";
      if (model.nvlinks > 0) return `NV${model.nvlinks}`;
      return from.numaNode === to.numaNode ? "NODE" : "SYS";
    });
    const first = from.numaNode * coresPerNode;
    return [
      `GPU${from.index}`,
      ...cells,
      `${first}-${first + coresPerNode - 1}`,
      `${from.numaNode}\t`,
      "N/A",
    ].join("\t");
  });
  return `\t\u001B[4m${header.join("\t")}\u001B[0m\n${rows.join("\n")}\n${topologyLegend}`;
}

/** `nvidia-smi` without arguments. */
export function table(readings: readonly GpuReading[], driver: DriverGeneration, atMs: number): string {
  const rule = "+-----------------------------------------+------------------------+----------------------+";
  const wide = "+-----------------------------------------------------------------------------------------+";
  const lines = [
    `${ctime(atMs)}       `,
    wide,
    `| NVIDIA-SMI ${driver.version.padEnd(22)} Driver Version: ${driver.version.padEnd(14)} CUDA Version: ${driver.cudaVersion.padEnd(8)} |`,
    rule,
    "| GPU  Name                 Persistence-M | Bus-Id          Disp.A | Volatile Uncorr. ECC |",
    "| Fan  Temp   Perf          Pwr:Usage/Cap |           Memory-Usage | GPU-Util  Compute M. |",
    "|                                         |                        |               MIG M. |",
    "|=========================================+========================+======================|",
  ];
  for (const r of readings) {
    const power = `${Math.floor(r.powerAverageWatts)}W / ${String(r.model.powerLimitWatts).padStart(4)}W`;
    const memory = `${r.memoryUsedMib}MiB / ${String(r.model.memoryTotalMib).padStart(6)}MiB`;
    const errors = String(r.ecc.dramUncorrected + r.ecc.sramUncorrected);
    lines.push(
      `| ${String(r.identity.index).padStart(3)}  ${r.model.name.padEnd(30)} On  |   ${r.identity.pciBusId} Off | ${errors.padStart(20)} |`,
      `| N/A ${String(r.temperature).padStart(4)}C    ${r.performanceState} ${power.padStart(25)} | ${memory.padStart(22)} | ${String(r.utilization).padStart(6)}%      Default |`,
      `|                                         |                        | ${(r.model.mig ? "Disabled" : "N/A").padStart(20)} |`,
      rule,
    );
  }
  lines.push(
    "",
    wide,
    "| Processes:                                                                              |",
    "|  GPU   GI   CI              PID   Type   Process name                        GPU Memory |",
    "|        ID   ID                                                               Usage      |",
    "|=========================================================================================|",
  );
  const running = readings.flatMap((r) =>
    r.processes.map((process) => ({ index: r.identity.index, process })),
  );
  if (running.length === 0)
    lines.push("|  No running processes found                                                             |");
  for (const { index, process } of running) {
    lines.push(
      `| ${String(index).padStart(4)}   N/A  N/A  ${String(process.pid).padStart(14)}      C   ${process.name.slice(0, 32).padEnd(32)} ${`${process.usedMib}MiB`.padStart(13)} |`,
    );
  }
  lines.push(wide, "");
  return lines.join("\n");
}
