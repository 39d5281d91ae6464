import { randomBytes } from "node:crypto";
import { link, mkdir, open, readFile, rename, rm, stat } from "node:fs/promises";
import { join } from "node:path";
import { errorMessage, PlatformError } from "@palebluedot/shared/errors.ts";
import { uuidv7 } from "uuidv7";
import { z } from "zod";

/** The controller's own files: `secret-key`, `replica-id`, `admin-token`, `controller.json`, `postgres/`. */

/** Makes the data directory; others may pass through it (the embedded PostgreSQL's user), not list it. */
export async function prepareDataDirectory(dir: string): Promise<void> {
  try {
    await mkdir(dir, { recursive: true, mode: 0o711 });
    const found = await stat(dir);
    if (!found.isDirectory()) throw new Error("it is not a directory");
  } catch (cause) {
    throw new PlatformError({
      code: "data-directory-unusable",
      kind: "invalid",
      message: `the data directory ${dir} cannot be used: ${errorMessage(cause)}`,
      hint: "PALEBLUEDOT_DATA_DIR names a directory that the controller's user may write.",
      cause,
    });
  }
}

/** Writes a file whole or not at all: readers see the old content or the new. */
export async function writeWhole(path: string, content: string, mode: number): Promise<void> {
  const temporary = await writeBeside(path, content, mode);
  await rename(temporary, path);
}

async function writeBeside(path: string, content: string, mode: number): Promise<string> {
  const temporary = `${path}.${process.pid}.${randomBytes(4).toString("hex")}.new`;
  const file = await open(temporary, "wx", mode);
  try {
    // The process's umask may have taken bits away.
    await file.chmod(mode);
    await file.writeFile(content);
    await file.sync();
  } finally {
    await file.close();
  }
  return temporary;
}

/** Reads a file, or makes it; of two makers at once one wins and both get its content. */
async function readOrMake(path: string, make: () => string, mode: number): Promise<string> {
  const existing = await readFile(path, "utf8").catch(absent);
  if (existing !== undefined) return existing;
  const temporary = await writeBeside(path, make(), mode);
  try {
    // Unlike rename, link fails where the file appeared meanwhile.
    await link(temporary, path);
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== "EEXIST") throw error;
  } finally {
    await rm(temporary, { force: true });
  }
  return await readFile(path, "utf8");
}

function absent(error: unknown): undefined {
  if ((error as NodeJS.ErrnoException).code === "ENOENT") return undefined;
  throw error;
}

/** 32 bytes for the SecretBox, from the given file or `<dir>/secret-key`, which is made at first start. */
export async function loadSecretKey(dir: string, file: string | undefined): Promise<Buffer> {
  let text: string;
  if (file === undefined) {
    text = await readOrMake(join(dir, "secret-key"), () => `${randomBytes(32).toString("base64")}\n`, 0o600);
  } else {
    try {
      text = await readFile(file, "utf8");
    } catch (cause) {
      throw new PlatformError({
        code: "secret-key-unreadable",
        kind: "invalid",
        message: `the secret key file cannot be read: ${errorMessage(cause)}`,
        hint: "PALEBLUEDOT_SECRET_KEY_FILE names a file with 32 random bytes as base64.",
        cause,
      });
    }
  }
  return Buffer.from(text.trim(), "base64");
}

/** Names this replica, the same after a restart, so that it takes its own leases over at once. */
export async function loadReplicaId(dir: string): Promise<string> {
  const text = await readOrMake(join(dir, "replica-id"), () => `${uuidv7()}\n`, 0o644);
  return z.uuid().parse(text.trim());
}
