import { readFile } from "node:fs/promises";
import { join } from "node:path";
import { errorMessage } from "@palebluedot/shared/errors.ts";
import type { Logger } from "@palebluedot/shared/logger.ts";
import { z } from "zod";
import { writeFileAtomic } from "./atomic-file.ts";
import type { DiskReserve } from "./disk-reserve.ts";

/** What must be remembered of a workload over a restart of the agent and cannot be read off the engine. */
const recordSchema = z.object({
  specHash: z.string(),
  /** A start was tried: a container that is gone now ran and is not simply new. */
  started: z.boolean(),
  restartCount: z.int().min(0),
  /** Quick failures in a row; the exponent of the back-off. */
  quickExits: z.int().min(0),
  /** FinishedAt of the last exit that was told as an event. */
  reportedExit: z.string(),
  /** GPUs that it may have touched and that were not verified since; they stay held over a restart. */
  gpuUuids: z.array(z.string()),
  failure: z.object({ reason: z.string(), message: z.string() }).optional(),
  /**
   * What was last told, in the wire's encoding as base64: an agent that starts while the engine is away
   * goes on telling it, and claims nothing else.
   */
  observed: z.base64(),
});
export type WorkloadRecord = z.infer<typeof recordSchema>;
const fileSchema = z.object({ version: z.literal(1), workloads: z.record(z.string(), recordSchema) });

export const emptyRecord = (specHash: string, gpuUuids: readonly string[]): WorkloadRecord => ({
  specHash,
  gpuUuids: [...gpuUuids],
  started: false,
  restartCount: 0,
  quickExits: 0,
  reportedExit: "",
  observed: "",
});

export interface RecordStore {
  get(allocationId: string): WorkloadRecord | undefined;
  set(allocationId: string, record: WorkloadRecord): void;
  delete(allocationId: string): void;
  entries(): readonly (readonly [allocationId: string, record: WorkloadRecord])[];
  /** Resolves when all that was set before is on disk. Failures are logged: the records are a refinement. */
  flush(): Promise<void>;
}

export async function createRecordStore(
  dataDir: string,
  log: Logger,
  disk: DiskReserve,
): Promise<RecordStore> {
  const path = join(dataDir, "workloads.json");
  const records = new Map<string, WorkloadRecord>();
  try {
    const stored = fileSchema.parse(JSON.parse(await readFile(path, "utf8")));
    for (const [id, record] of Object.entries(stored.workloads)) records.set(id, record);
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== "ENOENT") {
      log.warn({ path, reason: errorMessage(error) }, "workload records are unreadable and begin anew");
    }
  }
  let dirty = false;
  let writing: Promise<void> | undefined;

  async function write(): Promise<void> {
    while (dirty) {
      dirty = false;
      try {
        const workloads = Object.fromEntries(records);
        const content = `${JSON.stringify({ version: 1, workloads })}\n`;
        await disk.write(() => writeFileAtomic(path, content));
      } catch (error) {
        log.warn({ path, reason: errorMessage(error) }, "workload records could not be written");
      }
    }
  }
  function flush(): Promise<void> {
    writing ??= write().finally(() => {
      writing = undefined;
      if (dirty) void flush();
    });
    return writing;
  }
  return {
    get: (id) => records.get(id),
    set(id, record) {
      if (JSON.stringify(records.get(id)) === JSON.stringify(record)) return;
      records.set(id, record);
      dirty = true;
      void flush();
    },
    delete(id) {
      if (!records.delete(id)) return;
      dirty = true;
      void flush();
    },
    entries: () => [...records],
    flush,
  };
}
