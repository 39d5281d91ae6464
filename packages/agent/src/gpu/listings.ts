import { cleanText, count, gpuUuid, memoryBytes, withoutAnsi } from "./values.ts";

/** Parsers of nvidia-smi's smaller outputs: -L, topo -m, --query-compute-apps. */

interface ListedMigDevice {
  readonly index: number;
  /** "1g.10gb"; the "+me" suffix is dropped by nvidia-smi here. */
  readonly profile: string;
  readonly uuid: string;
}

export interface ListedGpu {
  readonly index: number;
  readonly model: string;
  readonly uuid: string;
  readonly migDevices: readonly ListedMigDevice[];
}

/** `nvidia-smi -L`. Lines that are neither GPU nor MIG device are skipped. */
export function parseList(text: string): ListedGpu[] {
  const gpus: (ListedGpu & { migDevices: ListedMigDevice[] })[] = [];
  for (const line of text.split(/\r?\n/).slice(0, 4096)) {
    const gpu = /^GPU (\d{1,4}): (.{0,200}) \(UUID: (GPU-[0-9a-fA-F-]{36})\)\s*$/.exec(line);
    if (gpu?.[3] !== undefined) {
      gpus.push({ index: Number(gpu[1]), model: cleanText(gpu[2] ?? ""), uuid: gpu[3], migDevices: [] });
      continue;
    }
    // "MIG-<uuid>", and before driver 470 "MIG-GPU-<uuid>/<gi>/<ci>".
    const mig = /^\s+MIG\s+(\S{1,32})\s+Device\s+(\d{1,4}):\s+\(UUID:\s+(MIG-[0-9a-zA-Z/-]{1,80})\)/.exec(
      line,
    );
    if (mig?.[3] !== undefined) {
      gpus.at(-1)?.migDevices.push({ index: Number(mig[2]), profile: mig[1] ?? "", uuid: mig[3] });
    }
  }
  return gpus;
}

export interface GpuTopology {
  readonly index: number;
  /** Bonded NVLinks to all others together: the highest NV# of the row; 0 when there is none. */
  readonly nvlinkCount: number;
  readonly nvlinkPeers: readonly number[];
  /** Of the CPU node that the GPU hangs on; undefined when not told. */
  readonly numaNode: number | undefined;
}

/** `nvidia-smi topo -m`: a tab-separated matrix with a header that carries ANSI escapes. */
export function parseTopology(text: string): GpuTopology[] {
  const lines = withoutAnsi(text).split(/\r?\n/);
  const headerAt = lines.findIndex((line) => /^\s*GPU0\b/.test(line) && !/^GPU0\s+X\b/.test(line));
  if (headerAt < 0) return [];
  const header = (lines[headerAt] ?? "").split("\t").map((cell) => cell.trim());
  const numaColumn = header.indexOf("NUMA Affinity");
  const rows: GpuTopology[] = [];
  for (const line of lines.slice(headerAt + 1)) {
    const cells = line.split("\t").map((cell) => cell.trim());
    const index = /^GPU(\d{1,4})$/.exec(cells[0] ?? "")?.[1];
    if (index === undefined) continue;
    const peers: number[] = [];
    let nvlinkCount = 0;
    header.forEach((name, column) => {
      const peer = /^GPU(\d{1,4})$/.exec(name)?.[1];
      const bonded = /^NV(\d{1,3})$/.exec(cells[column] ?? "")?.[1];
      if (peer === undefined || bonded === undefined) return;
      peers.push(Number(peer));
      nvlinkCount = Math.max(nvlinkCount, Number(bonded));
    });
    rows.push({
      index: Number(index),
      nvlinkCount,
      nvlinkPeers: peers,
      numaNode: numaColumn < 0 ? undefined : count(cells[numaColumn]),
    });
  }
  return rows;
}

export interface ComputeApp {
  readonly gpuUuid: string;
  readonly pid: number;
  readonly name: string;
  readonly memoryUsedBytes: number | undefined;
}

/**
 * The process name comes last: it is the tenant's to choose and may hold commas, which nvidia-smi does
 * not quote.
 */
export const computeAppFields = ["gpu_uuid", "pid", "used_gpu_memory", "process_name"] as const;

/**
 * `nvidia-smi --query-compute-apps=<computeAppFields> --format=csv,noheader,nounits`. A MIG process is
 * listed under its parent GPU. A line that is no row continues the name before it (names may hold line
 * breaks). Undefined where the output does not begin with a row: then nothing is known.
 */
export function parseComputeApps(text: string): ComputeApp[] | undefined {
  const apps: ComputeApp[] = [];
  for (const line of text.split(/\r?\n/)) {
    if (line.trim() === "" || /^no running processes found/i.test(line.trim())) continue;
    const match = /^([^,]*),([^,]*),([^,]*),(.*)$/.exec(line);
    const uuid = gpuUuid(match?.[1]);
    const pid = count(match?.[2]);
    if (match === null || uuid === undefined || pid === undefined) {
      if (apps.length === 0) return undefined;
      continue;
    }
    apps.push({
      gpuUuid: uuid,
      pid,
      name: cleanText(match[4] ?? ""),
      memoryUsedBytes: memoryBytes(match[3]),
    });
  }
  return apps;
}
