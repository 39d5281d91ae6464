import { setTimeout as delay } from "node:timers/promises";
import { afterAll, beforeAll, beforeEach, describe, expect, test } from "vitest";
import type { Sql } from "postgres";
import { connect, isTransientDatabaseError } from "./connect.ts";
import { createTestDatabase, type TestDatabase } from "./testing.ts";

/** Connections are cut at every awkward moment; see patches/README.md for what went wrong then. */

let database: TestDatabase;
let sql: Sql;
beforeAll(async () => {
  database = await createTestDatabase();
  sql = connect(database.url, { maxConnections: 1, applicationName: "victim" });
  await database.sql`create table written (value text)`;
});
afterAll(async () => {
  await sql.end({ timeout: 1 });
  await database.close();
});
beforeEach(() => database.sql`truncate written`);

const cut = (): Promise<unknown> =>
  database.sql`
    select pg_terminate_backend(pid) from pg_stat_activity
    where application_name = 'victim' and datname = current_database()`;

/** The victim's query is being worked on by the server. */
async function untilBusy(): Promise<void> {
  for (const deadline = performance.now() + 10_000; performance.now() < deadline; await delay(5)) {
    const rows = await database.sql`
      select from pg_stat_activity
      where application_name = 'victim' and datname = current_database() and wait_event in ('PgSleep', 'ClientWrite')`;
    if (rows.length > 0) return;
  }
  throw new Error("the query did not start");
}

async function expectLost(query: Promise<unknown>): Promise<void> {
  const outcome = await query.then(
    () => "answered",
    (error: unknown) => (isTransientDatabaseError(error) ? "lost" : error),
  );
  expect(outcome).toBe("lost");
}

/** The next queries are answered, each with its own rows. */
async function expectUsable(): Promise<void> {
  for (let number = 1; number <= 3; number += 1) {
    const rows = await sql`select ${number}::int as number, i from generate_series(1, 2) as i`;
    expect([...rows]).toEqual([
      { number, i: 1 },
      { number, i: 2 },
    ]);
  }
}

describe("a lost connection", () => {
  test("while idle is not noticed", async () => {
    await sql`select 1`;
    await cut();
    await delay(50);
    await expectUsable();
  });

  test("in a query fails that query alone", async () => {
    const query = sql`select pg_sleep(10)`;
    const lost = expectLost(query);
    await untilBusy();
    await cut();
    await lost;
    await expectUsable();
  });

  test("with queries behind the first: each is lost, or answered rightly", async () => {
    const first = expectLost(sql`select pg_sleep(10)`);
    const behind = [1, 2, 3].map((number) =>
      sql`select ${number}::int as number`.then(
        (rows) => rows[0]?.["number"] === number,
        isTransientDatabaseError,
      ),
    );
    await untilBusy();
    await cut();
    await first;
    expect(await Promise.all(behind)).toEqual([true, true, true]);
    for (let attempt = 0; attempt < 3; attempt += 1) await sql`select 1`.catch(() => undefined);
    await expectUsable();
  });

  test("in the middle of a result leaves nothing of it", async () => {
    const query = sql`
      select i, repeat('x', 1000) from generate_series(1, 100000) as i
      where i < 50000 or pg_sleep(case when i = 50000 then 10 else 0 end) is not null`;
    const lost = expectLost(query);
    await untilBusy();
    await cut();
    await lost;
    await expectUsable();
  });

  test("in a transaction rolls it back, and nothing of it is done later", async () => {
    const transaction = sql.begin(async (tx) => {
      await tx`insert into written values ('first')`;
      await tx`select pg_sleep(10)`.catch(() => undefined);
      await delay(100);
      await tx`insert into written values ('second')`;
    });
    const lost = expectLost(transaction);
    await untilBusy();
    await cut();
    await lost;
    await expectUsable();
    await delay(150);
    expect(await database.sql`select value from written`).toHaveLength(0);
  });

  test("between the statements of a transaction, too", async () => {
    const reached = Promise.withResolvers<void>();
    const goOn = Promise.withResolvers<void>();
    const transaction = sql.begin(async (tx) => {
      await tx`insert into written values ('first')`;
      reached.resolve();
      await goOn.promise;
      await tx`insert into written values ('second')`;
    });
    const lost = expectLost(transaction);
    await reached.promise;
    await cut();
    await lost;
    await expectUsable();
    goOn.resolve();
    await delay(50);
    expect(await database.sql`select value from written`).toHaveLength(0);
  });

  test("that was reserved is not replaced by another session", async () => {
    const reserved = await sql.reserve();
    await reserved`select set_config('palebluedot.mark', 'mine', false)`;
    await cut();
    await delay(50);
    await expectLost(reserved`select 1`.then(() => undefined));
    await expectLost(reserved`select current_setting('palebluedot.mark', true)`.then(() => undefined));
    reserved.release();
    await expectUsable();
  });

  test("again and again, under load, ends nothing but the queries that it hit", async () => {
    const stop = performance.now() + 1500;
    const counts = { answered: 0, lost: 0 };
    const load = Array.from({ length: 8 }, async (_, worker) => {
      while (performance.now() < stop) {
        try {
          const rows = await sql`select ${worker}::int as worker, i from generate_series(1, 20) as i`;
          expect(rows.map((row) => row["worker"] as number)).toEqual(
            Array.from({ length: 20 }, () => worker),
          );
          await sql.begin(async (tx) => {
            const [row] = await tx`select ${worker}::int as worker`;
            expect(row).toEqual({ worker });
          });
          counts.answered += 1;
        } catch (error) {
          if (!isTransientDatabaseError(error)) throw error;
          counts.lost += 1;
        }
      }
    });
    while (performance.now() < stop) {
      await cut();
      await delay(20);
    }
    await Promise.all(load);
    expect(counts.answered).toBeGreaterThan(10);
    expect(counts.lost).toBeGreaterThan(0);
    for (let attempt = 0; attempt < 3; attempt += 1) await sql`select 1`.catch(() => undefined);
    await expectUsable();
  });
});
