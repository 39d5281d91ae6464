import { chmod, lstat, mkdir, realpath, rm } from "node:fs/promises";
import { join } from "node:path";
import { errorMessage, PlatformError } from "@palebluedot/shared/errors.ts";

/** Allocation ids become directory, container and label names, so nothing but these characters gets in. */
export const safeNamePattern = /^[A-Za-z0-9][A-Za-z0-9_.-]{0,127}$/;

/** `<dataDir>/volumes`: the only place of the host that containers may mount. */
export interface VolumeStore {
  readonly root: string;
  /** Makes the volume when it is absent; the path holds no symbolic link that a tenant could have made. */
  ensure(allocationId: string, name: string): Promise<string>;
  /** Path of a volume; makes nothing. */
  pathOf(allocationId: string, name: string): string;
  /**
   * Deletes all volumes of the allocation; links in them are removed, never followed. Safe to repeat.
   * Throws `volume-not-deleted`.
   */
  remove(allocationId: string): Promise<void>;
}

function checked(name: string): string {
  if (!safeNamePattern.test(name)) {
    throw new PlatformError({
      code: "refused-name",
      kind: "invalid",
      message: `${JSON.stringify(name.slice(0, 100))} cannot name a directory`,
    });
  }
  return name;
}

export async function createVolumeStore(dataDir: string): Promise<VolumeStore> {
  await mkdir(join(dataDir, "volumes"), { recursive: true, mode: 0o700 });
  const root = join(await realpath(dataDir), "volumes");
  const pathOf = (allocationId: string, name: string): string =>
    join(root, checked(allocationId), checked(name));
  return {
    root,
    pathOf,
    async ensure(allocationId, name) {
      const path = pathOf(allocationId, name);
      await mkdir(path, { recursive: true, mode: 0o700 });
      if (!(await lstat(path)).isDirectory()) {
        throw new PlatformError({
          code: "volume-not-made",
          kind: "internal",
          message: `volume ${name} is no directory`,
        });
      }
      // The image decides which user writes here; the parent (0700) keeps everybody else of the host out.
      await chmod(path, 0o777);
      return path;
    },
    async remove(allocationId) {
      const path = join(root, checked(allocationId));
      try {
        await rm(path, { recursive: true, force: true, maxRetries: 3, retryDelay: 100 });
      } catch (cause) {
        throw new PlatformError({
          code: "volume-not-deleted",
          kind: "unavailable",
          message: `volumes of ${allocationId} could not be deleted: ${errorMessage(cause)}`,
          hint: "Is something else using the volume directory? The agent must own it.",
          cause,
        });
      }
    },
  };
}
