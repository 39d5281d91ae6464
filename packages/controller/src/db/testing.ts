import { spawn } from "node:child_process";
import { createHash, randomBytes } from "node:crypto";
import { existsSync } from "node:fs";
import { mkdir, rm } from "node:fs/promises";
import { createConnection, type Socket } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { setTimeout as delay } from "node:timers/promises";
import { fileURLToPath } from "node:url";
import { z } from "zod";
import postgres, { type Sql } from "postgres";
import { connect, databaseErrorCode, socketUrl } from "./connect.ts";
import { migrate, readMigrations } from "./migrate.ts";

export interface TestDatabase {
  readonly sql: Sql;
  /** For `connect()` or a controller's DATABASE_URL. */
  readonly url: string;
  close(): Promise<void>;
}

const startTimeoutMs = 90_000;
const replySchema = z.union([z.object({ url: z.string() }), z.object({ error: z.string() })]);

let server: Promise<string> | undefined;
let template: Promise<string> | undefined;

/**
 * A migrated database of its own on a real PostgreSQL: `PALEBLUEDOT_TEST_DATABASE_URL` (a superuser there)
 * or an embedded server that all test workers share. Throw-away: fsync is off on the embedded one.
 */
export async function createTestDatabase(
  options: { readonly maxConnections?: number } = {},
): Promise<TestDatabase> {
  server ??= serverUrl();
  const adminUrl = await server;
  template ??= ensureTemplate(adminUrl);
  const templateName = await template;
  const name = `test_${process.pid}_${randomBytes(6).toString("hex")}`;
  await withAdmin(adminUrl, (admin) => cloneTemplate(admin, name, templateName));
  const url = databaseUrl(adminUrl, name);
  const sql = connect(url, {
    applicationName: "palebluedot-test",
    maxConnections: options.maxConnections ?? 10,
  });
  return {
    sql,
    url,
    async close() {
      await sql.end({ timeout: 2 });
      await withAdmin(adminUrl, (admin) => admin.unsafe(`drop database if exists ${name} with (force)`));
    },
  };
}

function databaseUrl(url: string, name: string): string {
  const parsed = new URL(url);
  parsed.pathname = `/${name}`;
  return parsed.toString();
}

async function withAdmin<T>(url: string, run: (admin: Sql) => Promise<T>): Promise<T> {
  const admin = postgres({ ...socketUrl(databaseUrl(url, "postgres")), max: 1, onnotice: () => undefined });
  try {
    return await run(admin);
  } finally {
    await admin.end({ timeout: 2 });
  }
}

async function cloneTemplate(admin: Sql, name: string, templateName: string): Promise<void> {
  // 55006: somebody else is copying the template right now.
  for (const deadline = performance.now() + 30_000; ; await delay(20)) {
    try {
      await admin.unsafe(`create database ${name} template ${templateName}`);
      return;
    } catch (error) {
      if (databaseErrorCode(error) !== "55006" || performance.now() > deadline) throw error;
    }
  }
}

/** Named after the migrations' content, so that checkouts of different age share a server. */
async function ensureTemplate(adminUrl: string): Promise<string> {
  const migrations = await readMigrations();
  const hash = createHash("sha256");
  for (const migration of migrations) hash.update(migration.sql);
  const name = `template_${hash.digest("hex").slice(0, 16)}`;
  await withAdmin(adminUrl, async (admin) => {
    await admin`select pg_advisory_lock(7205759404)`;
    const existing = await admin`select 1 from pg_database where datname = ${name}`;
    if (existing.length > 0) return;
    const building = `${name}_building`;
    await admin.unsafe(`drop database if exists ${building} with (force)`);
    await admin.unsafe(`create database ${building}`);
    const sql = connect(databaseUrl(adminUrl, building), { maxConnections: 1 });
    try {
      await migrate(sql, { migrations });
    } finally {
      await sql.end({ timeout: 5 });
    }
    await admin.unsafe(`alter database ${building} rename to ${name}`);
  });
  return name;
}

async function serverUrl(): Promise<string> {
  const given = process.env["PALEBLUEDOT_TEST_DATABASE_URL"];
  if (given !== undefined && given !== "") return given;
  const directory = join(tmpdir(), `palebluedot-test-${process.getuid?.() ?? 0}`);
  await mkdir(directory, { recursive: true, mode: 0o711 });
  const control = join(directory, "control.sock");
  let error = "no answer";
  for (const deadline = performance.now() + startTimeoutMs; performance.now() < deadline; await delay(50)) {
    const socket = await open(control);
    if (socket === undefined) {
      // Nobody behind the file: its keeper was killed.
      if (existsSync(control)) await rm(control, { force: true });
      await startKeeper(control);
      continue;
    }
    const reply = await firstLine(socket).catch(() => undefined);
    const parsed = replySchema.safeParse(reply === undefined ? undefined : JSON.parse(reply));
    if (parsed.success && "url" in parsed.data) {
      // The open connection says that we still need the server; it does not keep this process alive.
      socket.unref();
      return parsed.data.url;
    }
    if (parsed.success && "error" in parsed.data) error = parsed.data.error;
    socket.destroy();
    if (parsed.success) break;
  }
  throw new Error(`the test database server did not start: ${error}`);
}

async function startKeeper(control: string): Promise<void> {
  const child = spawn(
    process.execPath,
    [fileURLToPath(new URL("testing-server.ts", import.meta.url)), control],
    { detached: true, stdio: "ignore" },
  );
  child.unref();
  for (const deadline = performance.now() + 15_000; performance.now() < deadline; await delay(50)) {
    if (existsSync(control) || child.exitCode !== null) return;
  }
}

function open(path: string): Promise<Socket | undefined> {
  return new Promise((settle) => {
    const socket = createConnection(path);
    socket.once("connect", () => settle(socket));
    socket.once("error", () => settle(undefined));
  });
}

function firstLine(socket: Socket): Promise<string> {
  return new Promise((settle, fail) => {
    let text = "";
    socket.on("data", (chunk) => {
      text += chunk.toString();
      const end = text.indexOf("\n");
      if (end >= 0) settle(text.slice(0, end));
    });
    socket.once("error", fail);
    socket.once("close", () => fail(new Error("closed")));
  });
}
