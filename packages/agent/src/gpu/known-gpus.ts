import { mkdir, readFile, rename, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { z } from "zod";
import type { GpuReading } from "./reading.ts";

/**
 * The GPUs of the last complete look, kept for the rest of this boot: an agent that is restarted while
 * nvidia-smi hangs still knows which GPUs its tenants' containers hold. After a reboot the hardware may be
 * another, so nothing is carried over.
 */
const gpuSchema = z.object({
  uuid: z.string().regex(/^GPU-[0-9a-fA-F-]{36}$/),
  index: z.int().min(0).max(1023),
  model: z.string().max(256).optional(),
  serial: z.string().max(256).optional(),
  pciBusId: z.string().max(32).optional(),
  driverVersion: z.string().max(256).optional(),
  cudaVersion: z.string().max(256).optional(),
  vbiosVersion: z.string().max(256).optional(),
  architecture: z.string().max(256).optional(),
  minorNumber: z.int().min(0).optional(),
  memoryTotalBytes: z.int().min(0).optional(),
  powerLimitMaxWatts: z.number().optional(),
  migMode: z.string().max(64).optional(),
  migPending: z.string().max(64).optional(),
});
const fileSchema = z.object({ bootId: z.string(), gpus: z.array(gpuSchema).max(64) });

export async function loadKnownGpus(
  stateDir: string | undefined,
  bootId: string,
): Promise<readonly GpuReading[]> {
  if (stateDir === undefined || bootId === "") return [];
  try {
    const stored = fileSchema.parse(JSON.parse(await readFile(fileOf(stateDir), "utf8")));
    return stored.bootId === bootId ? stored.gpus : [];
  } catch {
    // Absent or damaged: the next look tells.
    return [];
  }
}

export async function saveKnownGpus(
  stateDir: string | undefined,
  bootId: string,
  gpus: readonly GpuReading[],
): Promise<void> {
  if (stateDir === undefined) return;
  const stored = gpus.map((gpu) => gpuSchema.safeParse(gpu)).filter((parsed) => parsed.success);
  await mkdir(stateDir, { recursive: true });
  const temporary = `${fileOf(stateDir)}.tmp`;
  const text = JSON.stringify({ bootId, gpus: stored.map((parsed) => parsed.data) });
  await writeFile(temporary, text, { mode: 0o600 });
  await rename(temporary, fileOf(stateDir));
}

function fileOf(stateDir: string): string {
  return join(stateDir, "gpus.json");
}
