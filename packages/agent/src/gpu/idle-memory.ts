import { mkdir, readFile, rename, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { z } from "zod";

/**
 * How much memory a GPU shows as used when nothing runs on it: the driver keeps some, from 0 to several
 * hundred MiB, depending on driver, MIG and ECC. It is learned per GPU as the lowest reading at a moment
 * without any process, and kept on disk, because after a restart of the agent a tenant may be running.
 *
 * Residue must not be learned as idle, so a reading above the bound (1.25 % of the memory, at least
 * 512 MiB) teaches nothing. Until something was learned, the bound itself is the level.
 */
export interface IdleMemory {
  /** Teaches from a reading of a GPU on which no process was at that moment. */
  learn(gpuUuid: string, usedBytes: number, totalBytes: number | undefined): void;
  /** What is above this is residue. */
  allowedBytes(gpuUuid: string, totalBytes: number | undefined): number;
  save(): Promise<void>;
}

const mib = 1024 * 1024;
/** Readings move by a few MiB with nothing running (contexts of the persistence daemon, ECC scrubbing). */
const toleranceBytes = 64 * mib;
const maxGpus = 256;

const fileSchema = z.record(z.string().max(64), z.int().min(0));

export async function loadIdleMemory(stateDir: string | undefined): Promise<IdleMemory> {
  const file = stateDir === undefined ? undefined : join(stateDir, "gpu-idle-memory.json");
  const levels = new Map<string, number>();
  let changed = false;
  if (file !== undefined) {
    try {
      const stored = fileSchema.parse(JSON.parse(await readFile(file, "utf8")));
      for (const [uuid, bytes] of Object.entries(stored).slice(0, maxGpus)) levels.set(uuid, bytes);
    } catch {
      // Absent or damaged: learned again at the next moment without processes.
    }
  }
  return {
    learn: (gpuUuid, usedBytes, totalBytes) => {
      const known = levels.get(gpuUuid);
      if (usedBytes > boundBytes(totalBytes) || (known !== undefined && known <= usedBytes)) return;
      if (known === undefined && levels.size >= maxGpus) return;
      levels.set(gpuUuid, usedBytes);
      changed = true;
    },
    allowedBytes: (gpuUuid, totalBytes) => {
      const level = levels.get(gpuUuid);
      return level === undefined ? boundBytes(totalBytes) : level + toleranceBytes;
    },
    save: async () => {
      if (!changed || file === undefined || stateDir === undefined) return;
      changed = false;
      await mkdir(stateDir, { recursive: true });
      await writeFile(`${file}.tmp`, JSON.stringify(Object.fromEntries(levels)), { mode: 0o600 });
      await rename(`${file}.tmp`, file);
    },
  };
}

function boundBytes(totalBytes: number | undefined): number {
  return Math.max(512 * mib, Math.round((totalBytes ?? 0) * 0.0125));
}
