import { join } from "node:path";
import { writeWhole } from "../config/data-directory.ts";

/** Writes the admin token to `<dir>/admin-token`, mode 0600, and returns that path. */
export async function writeAdminToken(dir: string, token: string): Promise<string> {
  const path = adminTokenPath(dir);
  await writeWhole(path, `${token}\n`, 0o600);
  return path;
}

export const adminTokenPath = (dir: string): string => join(dir, "admin-token");
