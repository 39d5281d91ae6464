import { randomBytes } from "node:crypto";
import { chmod, lstat, mkdir, opendir, realpath, rename, rmdir, unlink } from "node:fs/promises";
import { join, sep } from "node:path";
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

const within = (directory: Buffer, name: Buffer): Buffer =>
  Buffer.concat([directory, Buffer.from(sep), name]);

/** Names as bytes: what a tenant calls its files need not be UTF-8. */
async function* entriesOf(
  path: Buffer,
): AsyncGenerator<{ readonly name: Buffer; readonly isDirectory: boolean }> {
  // Node's types know only names that are text.
  const directory = (await opendir(path, {
    encoding: "buffer" as BufferEncoding,
  })) as unknown as AsyncIterable<{
    readonly name: Buffer;
    isDirectory(): boolean;
  }>;
  for await (const entry of directory) yield { name: entry.name, isDirectory: entry.isDirectory() };
}

/**
 * Deletes a directory however deep it is. A path may have 4096 bytes and tenants can nest deeper than that,
 * so subdirectories are moved up beside their parents and no path ever has more than two levels below
 * `root`. Nothing is followed: links are unlinked, another file system mounted inside refuses the move.
 */
async function removeTree(root: string): Promise<void> {
  const top = Buffer.from(root);
  const prefix = `.removed-${randomBytes(6).toString("hex")}-`;
  let moved = 0;
  /** Directories directly below the root that are still there; names, as many as the tenant made. */
  const waiting: Buffer[] = [];
  for await (const { name, isDirectory } of entriesOf(top)) {
    if (isDirectory) waiting.push(name);
    else await unlink(within(top, name));
  }
  for (let name = waiting.pop(); name !== undefined; name = waiting.pop()) {
    const directory = within(top, name);
    for await (const entry of entriesOf(directory)) {
      const path = within(directory, entry.name);
      if (entry.isDirectory) {
        const fresh = Buffer.from(`${prefix}${(moved += 1)}`);
        await rename(path, within(top, fresh));
        waiting.push(fresh);
      } else {
        await unlink(path);
      }
    }
    await rmdir(directory);
  }
  await rmdir(top);
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
        const found = await lstat(path).catch((error: NodeJS.ErrnoException) => {
          if (error.code === "ENOENT") return undefined;
          throw error;
        });
        // An earlier try that was cut short left its directories in here: they are entries like all others.
        if (found?.isDirectory() === true) await removeTree(path);
        else if (found) await unlink(path);
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
