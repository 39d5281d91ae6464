import { randomBytes } from "node:crypto";
import { link, readFile, rm } from "node:fs/promises";
import { join } from "node:path";
import { errorMessage, PlatformError } from "@palebluedot/shared/errors.ts";
import { DesiredState } from "@palebluedot/shared/generated/palebluedot/agent/v1/agent.ts";
import type { Logger } from "@palebluedot/shared/logger.ts";
import { createSecretBox } from "@palebluedot/shared/secret-box.ts";
import { z } from "zod";
import { writeFileAtomic } from "./atomic-file.ts";
import type { DiskReserve } from "./disk-reserve.ts";

/** The last desired document, on disk. It holds tenants' secrets, so the whole of it is encrypted. */
export interface DesiredStore {
  /** Undefined when none is held, or when it cannot be read (logged): the controller then sends it again. */
  load(): Promise<StoredDesired | undefined>;
  save(stored: StoredDesired): Promise<void>;
}

export interface StoredDesired {
  readonly desired: DesiredState;
  /** Whose document it is; undefined when that was not told. */
  readonly serverId: string | undefined;
}

const fileSchema = z.object({ version: z.literal(1), sealed: z.base64(), server_id: z.string().optional() });
const context = "palebluedot/agent/desired-state";

async function readOrUndefined(path: string): Promise<string | undefined> {
  try {
    return await readFile(path, "utf8");
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === "ENOENT") return undefined;
    throw error;
  }
}

/** 32 random bytes as base64, made once; a second starter at the same time reads the first one's. */
async function loadKey(path: string): Promise<Buffer> {
  const held = await readOrUndefined(path);
  if (held !== undefined) return Buffer.from(held.trim(), "base64");
  const fresh = `${path}.${randomBytes(4).toString("hex")}`;
  await writeFileAtomic(fresh, `${randomBytes(32).toString("base64")}\n`);
  try {
    await link(fresh, path);
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== "EEXIST") throw error;
  } finally {
    await rm(fresh, { force: true });
  }
  return Buffer.from((await readFile(path, "utf8")).trim(), "base64");
}

/** Throws PlatformError `secret-key-invalid` when the key file was damaged. */
export async function createDesiredStore(
  dataDir: string,
  log: Logger,
  disk: DiskReserve,
): Promise<DesiredStore> {
  const box = createSecretBox(await loadKey(join(dataDir, "secret.key")));
  const path = join(dataDir, "desired.json");
  return {
    async load() {
      const text = await readOrUndefined(path);
      if (text === undefined) return undefined;
      try {
        const { sealed, server_id: serverId } = fileSchema.parse(JSON.parse(text));
        return { desired: DesiredState.decode(box.open(Buffer.from(sealed, "base64"), context)), serverId };
      } catch (error) {
        log.error(
          { path, reason: errorMessage(error) },
          "the stored desired state is unreadable; running containers are left alone until the controller sends it again",
        );
        return undefined;
      }
    },
    async save({ desired, serverId }) {
      const sealed = box.seal(DesiredState.encode(desired).finish(), context).toString("base64");
      try {
        const content = `${JSON.stringify({ version: 1, sealed, server_id: serverId })}\n`;
        await disk.write(() => writeFileAtomic(path, content));
      } catch (cause) {
        throw new PlatformError({
          code: "desired-state-not-stored",
          kind: "unavailable",
          message: `the desired state could not be stored: ${errorMessage(cause)}`,
          hint: "Is the disk of the agent's data directory full?",
          cause,
        });
      }
    },
  };
}
