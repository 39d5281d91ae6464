import { open, rename } from "node:fs/promises";
import { join } from "node:path";

/**
 * Writes the admin token to `<dir>/admin-token`, mode 0600, whole or not at all: it is written beside and
 * renamed, so that a reader never sees half a token and the mode holds also where a file was before.
 */
export async function writeAdminToken(dir: string, token: string): Promise<string> {
  const path = join(dir, "admin-token");
  const temporary = `${path}.${process.pid}.new`;
  const file = await open(temporary, "w", 0o600);
  try {
    // The mode of open() counts for new files only.
    await file.chmod(0o600);
    await file.writeFile(`${token}\n`);
    await file.sync();
  } finally {
    await file.close();
  }
  await rename(temporary, path);
  return path;
}
