import { execFile } from "node:child_process";
import { mkdtemp, readFile, rm, stat, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { setTimeout as delay } from "node:timers/promises";
import { promisify } from "node:util";
import { createLogger } from "@palebluedot/shared/logger.ts";
import { afterAll, describe, expect, test } from "vitest";
import { connect } from "./connect.ts";
import { startEmbeddedPostgres } from "./embedded-postgres.ts";
import { migrate, readMigrations, type Migration } from "./migrate.ts";
import { createNotifications } from "./notifications.ts";
import { createTestDatabase } from "./testing.ts";

const log = createLogger({ name: "test", level: "silent" });

async function eventually(check: () => boolean | Promise<boolean>, what: string): Promise<void> {
  for (const deadline = performance.now() + 20_000; performance.now() < deadline; await delay(20)) {
    if (await check()) return;
  }
  throw new Error(`did not happen: ${what}`);
}

describe("embedded PostgreSQL", () => {
  const directories: string[] = [];
  afterAll(async () => {
    for (const directory of directories) await rm(directory, { recursive: true, force: true });
  });

  test("starts, is taken over, survives a stale pid file, and its notifications resume", async () => {
    // A path that is too long for a socket, too.
    const parent = await mkdtemp(join(tmpdir(), `pbd-${"x".repeat(70)}-`));
    directories.push(parent);
    const directory = join(parent, "postgres");
    const first = await startEmbeddedPostgres({ directory, log });
    expect(first.adopted).toBe(false);
    expect((await stat(join(directory, "data"))).mode & 0o777).toBe(0o700);
    expect((await stat(join(directory, "password"))).mode & 0o777).toBe(0o600);
    const sql = connect(first.url, { log });
    await sql`create table kept (value bigint)`;
    await sql`insert into kept values (42)`;
    const notifications = createNotifications(sql, { log });
    const received: string[] = [];
    let reconnects = 0;
    notifications.listen(
      "fleet",
      (payload) => received.push(payload),
      () => (reconnects += 1),
    );
    await eventually(() => reconnects === 1, "listening");
    await notifications.notify("fleet", "one");
    await eventually(() => received.includes("one"), "first notification");

    const second = await startEmbeddedPostgres({ directory, log });
    expect([second.adopted, second.pid]).toEqual([true, first.pid]);

    // A crash: the pid file stays behind.
    process.kill(first.pid, "SIGKILL");
    await eventually(async () => {
      const text = await readFile(`/proc/${first.pid}/stat`, "utf8").catch(() => "");
      return text === "" || text.includes(") Z ");
    }, "postmaster dead");
    // Its pid now belongs to somebody else.
    const pidFile = join(directory, "data", "postmaster.pid");
    const content = (await readFile(pidFile, "utf8")).split("\n");
    await writeFile(pidFile, [String(process.pid), ...content.slice(1)].join("\n"));
    const third = await startEmbeddedPostgres({ directory, log });
    expect(third.adopted).toBe(false);
    await eventually(async () => {
      const rows = await sql<{ value: number }[]>`select value from kept`.catch(() => []);
      return rows[0]?.value === 42;
    }, "reconnected");
    await eventually(() => reconnects === 2, "listening again");
    await notifications.notify("fleet", "two");
    await eventually(() => received.includes("two"), "second notification");

    await notifications.close();
    await sql.end({ timeout: 1 });
    await third.stop();
    const { stdout } = await promisify(execFile)("ps", ["-eo", "pid,args"]);
    expect(stdout).not.toContain(directory);
  });
});

const extra = (number: number, breaking: boolean, sql: string): Migration => ({
  number,
  name: `000${number}_extra.sql`,
  breaking,
  sql,
});

describe("migrations", () => {
  test("racing starters apply each once, and a failing one leaves nothing", async () => {
    const database = await createTestDatabase();
    try {
      const shipped = await readMigrations();
      const next = shipped.length + 1;
      const migrations = [...shipped, extra(next, false, "create table added (id integer primary key)")];
      const results = await Promise.all([1, 2, 3, 4].map(() => migrate(database.sql, { migrations })));
      expect(results.flatMap((result) => result.applied)).toEqual([`000${next}_extra.sql`]);
      expect(new Set(results.map((result) => result.incarnation)).size).toBe(1);

      const failing = [...migrations, extra(next + 1, false, "create table half (id int); select 1/0")];
      await expect(migrate(database.sql, { migrations: failing })).rejects.toMatchObject({ code: "22012" });
      const [half] = await database.sql`select to_regclass('half') as name`;
      expect(half?.["name"]).toBeNull();
    } finally {
      await database.close();
    }
  });

  test("a newer schema is accepted until a breaking migration is in it", async () => {
    const database = await createTestDatabase();
    try {
      const shipped = await readMigrations();
      const next = shipped.length + 1;
      await migrate(database.sql, { migrations: [...shipped, extra(next, false, "select 1")] });
      expect((await migrate(database.sql, { migrations: shipped })).applied).toEqual([]);
      await migrate(database.sql, {
        migrations: [...shipped, extra(next, false, "select 1"), extra(next + 1, true, "select 1")],
      });
      await expect(migrate(database.sql, { migrations: shipped })).rejects.toMatchObject({
        code: "schema-too-new",
      });
    } finally {
      await database.close();
    }
  });
});
