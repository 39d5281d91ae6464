import { existsSync } from "node:fs";
import { fileURLToPath } from "node:url";

/**
 * Folder of recordings of real devices, which some developers keep beside the checkout (they may not be
 * redistributed). Undefined where it is absent: a test that reads it then skips, by name.
 */
export function recordingsDir(): string | undefined {
  const dir =
    process.env["PALEBLUEDOT_RECORDINGS_DIR"] ??
    fileURLToPath(new URL("../../../../../shared/data", import.meta.url));
  return existsSync(dir) ? dir : undefined;
}
