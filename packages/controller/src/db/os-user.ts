import { readFile } from "node:fs/promises";
import { PlatformError } from "@palebluedot/shared/errors.ts";
import { execa } from "execa";

/** Who the database server runs as. Undefined ids: the user that runs this process. */
export interface OsUser {
  readonly uid: number | undefined;
  readonly gid: number | undefined;
}

const userName = "postgres";

async function lookUp(): Promise<OsUser | undefined> {
  const line = (await readFile("/etc/passwd", "utf8"))
    .split("\n")
    .find((entry) => entry.startsWith(`${userName}:`));
  const [, , uid, gid] = line?.split(":") ?? [];
  if (uid === undefined || gid === undefined) return undefined;
  return { uid: Number(uid), gid: Number(gid) };
}

/**
 * PostgreSQL refuses to run as root. Where we are root it runs as the user `postgres`, made when missing;
 * elsewhere as ourselves.
 */
export async function unprivilegedUser(): Promise<OsUser> {
  if (process.getuid?.() !== 0) return { uid: undefined, gid: undefined };
  const existing = await lookUp();
  if (existing !== undefined) return existing;
  const attempts: string[] = [];
  for (const [command, args] of [
    ["useradd", ["--system", "--user-group", "--no-create-home", "--shell", "/usr/sbin/nologin", userName]],
    ["adduser", ["-S", "-D", "-H", "-s", "/sbin/nologin", userName]],
  ] as const) {
    const result = await execa(command, args, { reject: false, timeout: 20_000, stdin: "ignore" });
    // Two starters may race: what counts is that the user exists afterwards.
    const made = await lookUp();
    if (made !== undefined) return made;
    attempts.push(`${command}: ${result.stderr.trim() || result.shortMessage || `exit ${result.exitCode}`}`);
  }
  throw new PlatformError({
    code: "embedded-postgres-user-missing",
    kind: "unavailable",
    message: `the embedded PostgreSQL may not run as root, and the user "${userName}" could not be made: ${attempts.join("; ")}`,
    hint: `Create a system user "${userName}", run the controller as an ordinary user, or set DATABASE_URL.`,
  });
}
