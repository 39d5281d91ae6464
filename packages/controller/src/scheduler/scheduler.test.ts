import { setTimeout as delay } from "node:timers/promises";
import { systemClock } from "@palebluedot/shared/clock.ts";
import { afterEach, beforeEach, describe, expect, test } from "vitest";
import {
  createTestAgent,
  createTestFeature,
  seedServers,
  seedTenant,
  testRequest,
  type SeededServer,
  type TestFeature,
} from "../allocations/testing.ts";
import type { AllocationCaller } from "../allocations/types.ts";
import { createTestDatabase, type TestDatabase } from "../db/testing.ts";

let database: TestDatabase;
let feature: TestFeature;
let now = 0;
let caller: AllocationCaller;

beforeEach(async () => {
  now = Date.parse("2026-11-01T00:00:00Z");
  database = await createTestDatabase();
  feature = createTestFeature(database.sql, { clock: { ...systemClock, now: () => now } });
  caller = { tenantId: await seedTenant(database.sql), actor: "token:test" };
});
afterEach(async () => {
  await feature.close();
  await database.close();
});

async function fleet(count: number): Promise<[SeededServer, ...SeededServer[]]> {
  const [first, ...more] = await seedServers(database.sql, { count, gpus: 4 });
  if (first === undefined) throw new Error("no server");
  return [first, ...more];
}

async function ask(count: number, priority = 0): Promise<string> {
  const request = testRequest({ count }, { priority });
  const { allocation } = await feature.service.create(caller, request);
  return allocation.id;
}

async function stateOf(id: string): Promise<string> {
  return (await feature.service.get(caller, id)).state;
}

describe("the order of the queue", () => {
  test("a small request overtakes a large one that does not fit, but not one that waits for too long", async () => {
    await fleet(1);
    await ask(1);
    await feature.scheduler.runOnce();
    const large = await ask(4);
    const overtaking = await ask(1);
    await feature.scheduler.runOnce();
    expect(await stateOf(overtaking)).toBe("scheduled");

    now += 300_001;
    const small = await ask(2);
    await feature.scheduler.runOnce();
    expect(await stateOf(small)).toBe("queued");
    expect((await feature.service.get(caller, small)).message).toBe(
      "the GPUs that would fit are kept free for a request that has waited longer",
    );
    const urgent = await ask(2, 50);
    await feature.scheduler.runOnce();
    expect(await stateOf(urgent)).toBe("scheduled");
    expect(await stateOf(large)).toBe("queued");
  });

  test("what waited behind it starts as soon as it gives up, also when another controller was told", async () => {
    const [server] = await fleet(1);
    await ask(1);
    await feature.scheduler.runOnce();
    const large = await ask(4);
    now += 300_001;
    const small = await ask(3);
    await feature.scheduler.runOnce();
    expect(await stateOf(small)).toBe("queued");

    const other = createTestFeature(database.sql, { clock: { ...systemClock, now: () => now } });
    await other.service.release(caller, large);
    await other.close();
    expect(await feature.scheduler.runOnce()).toBe(1);
    expect(await stateOf(small)).toBe("scheduled");
    expect((await feature.service.get(caller, small)).server_id).toBe(server.id);
  });

  test("the server that was kept free goes to the one it was kept for", async () => {
    const [server] = await fleet(1);
    const running = await ask(1);
    await feature.scheduler.runOnce();
    const agent = createTestAgent(server.id);
    await agent.sync(feature.agentPort);
    const large = await ask(4);
    now += 300_001;
    const small = await ask(3);
    await feature.scheduler.runOnce();
    await feature.service.release(caller, running);
    await agent.sync(feature.agentPort);
    await feature.scheduler.runOnce();
    expect([await stateOf(large), await stateOf(small)]).toEqual(["scheduled", "queued"]);
  });

  test("a server kept free for a request that found another is open again", async () => {
    const [first] = await fleet(2);
    // One GPU is free on each: two fit nowhere.
    await ask(3);
    await ask(3);
    await feature.scheduler.runOnce();
    const large = await ask(2);
    now += 300_001;
    const small = await ask(1);
    await feature.scheduler.runOnce();
    // One server is kept free, the other is not.
    expect([await stateOf(large), await stateOf(small)]).toEqual(["queued", "scheduled"]);
    const behind = await ask(1);
    await feature.scheduler.runOnce();
    expect(await stateOf(behind)).toBe("queued");
    await database.sql`
      insert into gpus (id, server_id, uuid, index, model, pci_bus_id, memory_bytes, inventory, health, mig_enabled)
      select gen_random_uuid(), server_id, 'GPU-' || gen_random_uuid(), 4 + n, model, pci_bus_id, memory_bytes,
        inventory, health, mig_enabled
      from gpus, generate_series(0, 1) as n where server_id = ${first.id} and index = 0`;
    feature.agentPort.capacityChanged([first.id]);
    await feature.scheduler.runOnce();
    expect([await stateOf(large), await stateOf(behind)]).toEqual(["scheduled", "scheduled"]);
  });
});

/** Until a statement of this database waits for a row that another transaction holds. */
async function somebodyWaits(): Promise<void> {
  for (const deadline = performance.now() + 10_000; performance.now() < deadline; await delay(5)) {
    const rows = await database.sql`
      select from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'`;
    if (rows.length > 0) return;
  }
  throw new Error("nobody waits");
}

describe("a server that is closed while something is placed on it", () => {
  test.each([
    ["retired", "state = 'retired'"],
    ["draining", "draining = true"],
    ["in maintenance", "state = 'maintenance'"],
  ])("%s: the placement that waited for it does not happen", async (_name, change) => {
    const [server] = await fleet(1);
    await feature.scheduler.runOnce();
    const id = await ask(1);
    const outcome = await database.sql.begin(async (tx) => {
      await tx`select from servers where id = ${server.id} for update`;
      const placing = feature.scheduler.runOnce();
      await somebodyWaits();
      await tx.unsafe(`update servers set ${change} where id = $1`, [server.id]);
      return { placing };
    });
    expect(await outcome.placing).toBe(0);
    expect(await stateOf(id)).toBe("queued");
    expect(await database.sql`select id from claims`).toHaveLength(0);
  });
});
