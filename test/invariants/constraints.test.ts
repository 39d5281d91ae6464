import { seedServers, seedTenant, testRequest } from "@palebluedot/controller/allocations/testing.ts";
import { createTestDatabase, type TestDatabase } from "@palebluedot/controller/db/testing.ts";
import type { Sql } from "postgres";
import { uuidv7 } from "uuidv7";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { databaseInvariants } from "./checks.ts";

/**
 * Each invariant of claims is kept by the database itself: a writer that ignores every rule of the code is
 * refused, and with that one constraint gone the same writes go through and break the invariant.
 */

interface Claim {
  readonly allocation: string;
  readonly gpu?: string | null;
  readonly mode?: string;
  readonly slots?: string;
  readonly lane?: string;
  readonly exclusive?: number;
  readonly media?: boolean;
  readonly released?: boolean;
}

let database: TestDatabase;
let server = "";
let gpus: string[] = [];
let elsewhere = "";
let first = "";
let second = "";

beforeAll(async () => {
  database = await createTestDatabase();
  const tenant = await seedTenant(database.sql);
  const [seeded, other] = await seedServers(database.sql, { count: 2, gpus: 2 });
  elsewhere = other?.gpus[0]?.id ?? "";
  server = seeded?.id ?? "";
  gpus = seeded?.gpus.map((gpu) => gpu.id) ?? [];
  [first, second] = [uuidv7(), uuidv7()];
  for (const id of [first, second]) {
    await database.sql`
      insert into allocations (id, tenant_id, state, server_id, request, lease_seconds)
      values (${id}, ${tenant}, 'scheduled', ${server}, ${JSON.stringify(testRequest())}::text::jsonb, 60)`;
  }
});
afterAll(() => database.close());

async function insert(sql: Sql, claim: Claim): Promise<void> {
  await sql`
    insert into claims (id, allocation_id, server_id, gpu_id, mode, slots, lane, media_extension, server_exclusive,
      released_at)
    values (${uuidv7()}, ${claim.allocation}, ${server}, ${claim.gpu === undefined ? (gpus[0] ?? null) : claim.gpu},
      ${claim.mode ?? "whole"}, ${claim.slots ?? "[0,)"}::text::int4range, ${claim.lane ?? "[0,)"}::text::int4range,
      ${claim.media ?? false}, ${claim.exclusive ?? 0}, ${claim.released === true ? new Date() : null})`;
}

interface Attack {
  readonly constraint: string;
  readonly drop: string;
  /** Dropped for both tries: another constraint that refuses the same writes. */
  readonly without?: string;
  readonly breaks: keyof typeof databaseInvariants;
  readonly claims: () => Claim[];
}

const dropConstraint = (name: string): string => `alter table claims drop constraint ${name}`;

const attacks: Record<string, Attack> = {
  "one GPU to two allocations": {
    constraint: "claims_no_overlap",
    drop: dropConstraint("claims_no_overlap"),
    breaks: "no GPU slot is claimed twice",
    claims: () => [{ allocation: first }, { allocation: second }],
  },
  "overlapping MIG placements": {
    constraint: "claims_no_overlap",
    drop: dropConstraint("claims_no_overlap"),
    breaks: "no GPU slot is claimed twice",
    claims: () => [
      { allocation: first, mode: "mig", slots: "[0,4)" },
      { allocation: second, mode: "mig", slots: "[3,4)" },
    ],
  },
  "one lane twice": {
    constraint: "claims_no_overlap",
    drop: dropConstraint("claims_no_overlap"),
    breaks: "no GPU slot is claimed twice",
    claims: () => [
      { allocation: first, mode: "share", lane: "[2,3)" },
      { allocation: second, mode: "share", lane: "[2,3)" },
    ],
  },
  "the same GPU whole and as lanes": {
    constraint: "claims_one_mode",
    drop: dropConstraint("claims_one_mode"),
    breaks: "live claims on a GPU have one mode",
    // Claims of two modes always overlap as well; this is the second line of defence.
    without: dropConstraint("claims_no_overlap"),
    claims: () => [
      { allocation: first, mode: "mig", slots: "[0,1)" },
      { allocation: second, mode: "share", lane: "[5,6)", slots: "[0,)" },
    ],
  },
  "a server as a whole and one of its GPUs": {
    constraint: "claims_server_exclusivity",
    drop: dropConstraint("claims_server_exclusivity"),
    breaks: "a server used as a whole is used by one allocation alone",
    claims: () => [
      { allocation: first, gpu: null, exclusive: 1 },
      { allocation: second, exclusive: 0 },
    ],
  },
  "a server as a whole twice": {
    constraint: "claims_server_owner",
    drop: dropConstraint("claims_server_owner"),
    breaks: "a server used as a whole is used by one allocation alone",
    claims: () => [
      { allocation: first, gpu: null, exclusive: 1 },
      { allocation: second, gpu: null, exclusive: 1 },
    ],
  },
  "two media extensions": {
    constraint: "claims_one_media_extension",
    drop: "drop index claims_one_media_extension",
    breaks: "one media extension on a GPU",
    claims: () => [
      { allocation: first, mode: "mig", slots: "[0,1)", media: true },
      { allocation: second, mode: "mig", slots: "[1,2)", media: true },
    ],
  },
  "an empty range, which overlaps nothing": {
    constraint: "claims_slots_check",
    drop: dropConstraint("claims_slots_check"),
    // "whole means [0,)" refuses it, too.
    without: dropConstraint("claims_check2"),
    breaks: "claims are of well-formed ranges",
    claims: () => [{ allocation: first, slots: "empty" }],
  },
  "a GPU of another server": {
    constraint: "claims_gpu_of_server",
    drop: dropConstraint("claims_gpu_of_server"),
    breaks: "a live claim is on a GPU of its server",
    claims: () => [{ allocation: first, gpu: elsewhere }],
  },
  "release before the use ended": {
    constraint: "claims_check",
    drop: dropConstraint("claims_check"),
    breaks: "claims are released only after their use ended",
    claims: () => [{ allocation: first, released: true }],
  },
};

class Undo extends Error {}

/** Runs in a transaction that is always undone. */
async function attempt(run: (sql: Sql) => Promise<void>): Promise<void> {
  await database.sql
    .begin(async (tx) => {
      await run(tx as unknown as Sql);
      throw new Undo();
    })
    .catch((error: unknown) => {
      if (!(error instanceof Undo)) throw error;
    });
}

const move = (sql: Sql) => sql`
  update gpus set server_id = (select server_id from gpus where id = ${elsewhere}) where id = ${gpus[0] ?? ""}`;

describe("claims are kept apart by the database", () => {
  test.each(Object.entries(attacks))("%s", async (_name, attack) => {
    const write = async (sql: Sql): Promise<void> => {
      if (attack.without !== undefined) await sql.unsafe(attack.without);
      for (const claim of attack.claims()) await insert(sql, claim);
    };
    await expect(attempt(write)).rejects.toMatchObject({
      code: expect.stringMatching(/^23/),
      constraint_name: attack.constraint,
    });

    await attempt(async (sql) => {
      await sql.unsafe(attack.drop);
      await write(sql);
      const found = await databaseInvariants[attack.breaks]?.(sql);
      expect(found, `without ${attack.constraint}`).not.toEqual([]);
    });
  });

  test("a claimed GPU moves to no other server; a released one does, and its history stays", async () => {
    await expect(
      attempt(async (sql) => {
        await insert(sql, { allocation: first });
        await move(sql);
      }),
    ).rejects.toMatchObject({ constraint_name: "claims_gpu_of_server" });
    await attempt(async (sql) => {
      await insert(sql, { allocation: first });
      await sql`update claims set usage_ended_at = now(), released_at = now()`;
      await move(sql);
      expect(await sql`select server_id from claims`).toEqual([{ server_id: server }]);
    });
  });

  test("what does not collide goes in together", async () => {
    await attempt(async (sql) => {
      await insert(sql, { allocation: first, mode: "mig", slots: "[0,4)", media: true });
      await insert(sql, { allocation: second, mode: "mig", slots: "[4,8)" });
      await insert(sql, { allocation: second, gpu: gpus[1] ?? null });
      for (const [name, query] of Object.entries(databaseInvariants)) {
        if (/claim|mode|media|server used/.test(name) && !/allocation with GPUs|waits/.test(name)) {
          expect(await query(sql), name).toHaveLength(0);
        }
      }
    });
  });
});
