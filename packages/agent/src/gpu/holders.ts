import type { GpuHolder } from "@palebluedot/shared/generated/palebluedot/agent/v1/agent.ts";
import { parseCsvText } from "./csv.ts";
import type { IdleMemory } from "./idle-memory.ts";
import { computeAppFields, parseComputeApps } from "./listings.ts";
import type { SmiDocument } from "./xml.ts";
import { failureOf, type SmiFailure } from "./smi-failure.ts";
import type { SmiRunner } from "./smi-runner.ts";

export type Holders =
  | { readonly kind: "known"; readonly holders: readonly GpuHolder[] }
  | { readonly kind: "unknown"; readonly reason: string };

const memoryFields = ["index", "uuid", "memory.used", "memory.total"];

export interface HoldersOptions {
  readonly runner: SmiRunner;
  readonly idle: IdleMemory;
  readonly deadlineMs: number;
  /** A fresh `-q -x` of these GPUs, which alone lists graphics processes. */
  readonly document: (gpuUuids: readonly string[]) => Promise<SmiDocument | SmiFailure>;
}

/**
 * What sits on the GPUs now. The cheap queries come first; only when they find nothing is the expensive
 * document read, for graphics processes, before the GPUs are called empty.
 */
export async function findHolders(gpuUuids: readonly string[], options: HoldersOptions): Promise<Holders> {
  const { runner, idle, deadlineMs } = options;
  const wanted = new Set(gpuUuids);
  if (wanted.size === 0) return { kind: "known", holders: [] };
  // Only these: a lost GPU beside them makes nvidia-smi fail for all.
  const selection = ["-i", [...wanted].join(",")];
  const [apps, memory] = await Promise.all([
    runner.run(
      "apps",
      [`--query-compute-apps=${computeAppFields.join(",")}`, "--format=csv,noheader,nounits", ...selection],
      deadlineMs,
    ),
    runner.run(
      "memory",
      [`--query-gpu=${memoryFields.join(",")}`, "--format=csv,noheader,nounits", ...selection],
      deadlineMs,
    ),
  ]);
  const failure = failureOf(apps) ?? failureOf(memory);
  if (failure !== undefined) return unknown(failure.message);
  const processes = apps.kind === "ok" ? parseComputeApps(apps.stdout) : undefined;
  if (processes === undefined) return unknown("nvidia-smi's list of processes cannot be read");

  const holders: GpuHolder[] = processes
    .filter((app) => wanted.has(app.gpuUuid))
    .map((app) => ({
      gpuUuid: app.gpuUuid,
      pid: app.pid,
      processName: app.name,
      memoryUsedBytes: app.memoryUsedBytes ?? 0,
    }));
  const rows = memory.kind === "ok" ? parseCsvText(memoryFields, memory.stdout).gpus : [];
  for (const uuid of wanted) {
    const row = rows.find((candidate) => candidate.uuid === uuid);
    if (row === undefined) return unknown(`nvidia-smi does not list ${uuid}`);
    const used = row.memoryUsedBytes;
    if (used === undefined) return unknown(`nvidia-smi does not tell the used memory of ${uuid}`);
    // A process explains the memory it holds: residue is only reported beside none.
    const explained = holders.some((holder) => holder.gpuUuid === uuid);
    if (!explained && used > idle.allowedBytes(uuid, row.memoryTotalBytes)) {
      holders.push({ gpuUuid: uuid, pid: 0, processName: "", memoryUsedBytes: used });
    }
  }
  if (holders.length > 0) return { kind: "known", holders };

  const document = await options.document([...wanted]);
  if (!("gpus" in document)) return unknown(document.message);
  for (const uuid of wanted) {
    const gpu = document.gpus.find((candidate) => candidate.uuid === uuid);
    if (gpu === undefined) return unknown(`nvidia-smi does not list ${uuid}`);
    if (gpu.processes === undefined) return unknown(`nvidia-smi does not list the processes of ${uuid}`);
    for (const process of gpu.processes) {
      holders.push({
        gpuUuid: uuid,
        pid: process.pid,
        processName: process.name,
        memoryUsedBytes: process.memoryUsedBytes ?? 0,
      });
    }
  }
  return { kind: "known", holders };
}

function unknown(reason: string): Holders {
  return { kind: "unknown", reason };
}
