import { createTestDatabase, type TestDatabase } from "@palebluedot/controller/db/testing.ts";
import * as fc from "fast-check";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { brokenInvariants } from "./checks.ts";
import { laneCount, World, type AgentMood, type Operation } from "./world.ts";

/**
 * Random interleavings over four connections against a real PostgreSQL.
 *
 *     PALEBLUEDOT_PROPERTY_RUNS=10000 vitest run test/invariants
 */
const runs = Number(process.env["PALEBLUEDOT_PROPERTY_RUNS"] ?? 200);
const timeoutMs = 120_000 + runs * 2000;

const lane = fc.nat(laneCount - 1);
const moods: AgentMood[] = [
  "works",
  "works",
  "works",
  "fails",
  "exits",
  "dirty",
  "slow",
  "lies",
  "keeps-report",
];
const operation: fc.Arbitrary<Operation> = fc.oneof(
  {
    weight: 6,
    arbitrary: fc.record({
      lane,
      kind: fc.constant("create" as const),
      count: fc.integer({ min: 1, max: 4 }),
      key: fc.option(fc.nat(4), { nil: undefined }),
      priority: fc.constantFrom(0, 0, 50),
    }),
  },
  { weight: 6, arbitrary: fc.record({ lane, kind: fc.constant("schedule" as const) }) },
  {
    weight: 8,
    arbitrary: fc.record({
      lane,
      kind: fc.constant("agent" as const),
      server: fc.nat(2),
      mood: fc.constantFrom(...moods),
    }),
  },
  { weight: 5, arbitrary: fc.record({ lane, kind: fc.constant("release" as const), pick: fc.nat(100) }) },
  { weight: 3, arbitrary: fc.record({ lane, kind: fc.constant("reconcile" as const) }) },
  {
    weight: 2,
    arbitrary: fc.record({
      lane,
      kind: fc.constant("time" as const),
      seconds: fc.constantFrom(1, 100, 301, 700),
    }),
  },
  {
    weight: 1,
    arbitrary: fc.record({
      lane,
      kind: fc.constant("extend" as const),
      pick: fc.nat(100),
      seconds: fc.constantFrom(1, 600),
    }),
  },
  { weight: 2, arbitrary: fc.record({ lane, kind: fc.constant("late-report" as const), pick: fc.nat(100) }) },
  {
    weight: 2,
    arbitrary: fc.record({
      lane,
      kind: fc.constant("server" as const),
      server: fc.nat(2),
      change: fc.constantFrom("lost" as const, "found" as const, "drain" as const, "undrain" as const),
    }),
  },
  { weight: 1, arbitrary: fc.record({ lane, kind: fc.constant("restart" as const) }) },
);
const history = fc.array(operation, { minLength: 30, maxLength: 60, size: "max" });

let database: TestDatabase;
beforeAll(async () => {
  database = await createTestDatabase({ maxConnections: 3 });
});
afterAll(() => database.close());

/** Every broken invariant of one history. */
async function play(target: TestDatabase, operations: readonly Operation[]): Promise<string[]> {
  const world = await World.create(target.sql, target.url);
  const broken: string[] = [];
  const check = async (when: string): Promise<void> => {
    await world.checkPromises();
    const found = [...world.violations.splice(0), ...(await brokenInvariants(target.sql))];
    broken.push(...found.map((violation) => `${when}: ${violation}`));
  };
  try {
    const middle = operations.length >> 1;
    await world.run(operations.slice(0, middle));
    await check("half way");
    await world.run(operations.slice(middle));
    await world.retryLostAnswers();
    await check("at the end");
    await world.settle();
    await check("after recovery");
    await world.drainAll();
    await check("after everything was released");
  } finally {
    await world.close();
  }
  return broken;
}

describe("allocations under random interleavings", () => {
  test(
    `${runs} histories keep every invariant`,
    async () => {
      let operations = 0;
      await fc.assert(
        fc.asyncProperty(history, async (events) => {
          operations += events.length;
          expect(await play(database, events)).toEqual([]);
        }),
        // Real concurrency does not repeat itself, so shrinking would chase shadows.
        { numRuns: runs, endOnFailure: true },
      );
      process.stderr.write(`${JSON.stringify({ property: "allocations", runs, operations })}\n`);
    },
    timeoutMs,
  );

  test(
    "without the exclusion constraint the same histories hand GPUs out twice, and it is noticed",
    async () => {
      const unprotected = await createTestDatabase({ maxConnections: 3 });
      try {
        await unprotected.sql`alter table claims drop constraint claims_no_overlap`;
        let noticed: string[] = [];
        await fc
          .assert(
            fc.asyncProperty(history, async (events) => {
              noticed = await play(unprotected, events);
              return noticed.length === 0;
            }),
            { numRuns: 100, endOnFailure: true },
          )
          .catch(() => undefined);
        expect(noticed.join("\n")).toMatch(/no GPU slot is claimed twice|is to start on a GPU that/);
      } finally {
        await unprotected.close();
      }
    },
    timeoutMs,
  );
});
