import { WorkloadObserved_Phase } from "@palebluedot/shared/generated/palebluedot/agent/v1/agent.ts";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import {
  createTestFeature,
  seededSessionEpoch,
  seedServers,
  seedTenant,
  testRequest,
  workloadReport,
  type TestFeature,
} from "../allocations/testing.ts";
import type { AllocationCaller } from "../allocations/types.ts";
import { type EventFilter, listEvents } from "../events/event-row.ts";
import { sequenceOutbox } from "../events/sequencer.ts";
import { createTestDatabase, type TestDatabase } from "./testing.ts";
import { recordPlans, type ExecutedPlan, type PlanRecorder } from "./testing-plans.ts";

/** Tables that grow with the fleet or with time; the others hold a handful of rows. */
const growing = /^(allocations|claims|gpus|servers|events|idempotency_keys|reconcile_queue|certificates)/;
/** Partial indexes that hold only the queue and whole-server claims: to read them whole is what they are for. */
const small = new Set(["allocations_queue", "claims_server_owner"]);
/** A prepared statement may get its generic plan with the sixth execution. */
const executions = 8;

let database: TestDatabase;
let recorder: PlanRecorder;
let feature: TestFeature;
let caller: AllocationCaller;

beforeAll(async () => {
  database = await createTestDatabase();
  caller = { tenantId: await seedTenant(database.sql), actor: "token:test" };
  await seedServers(database.sql, { count: 2, gpus: 8 });
  recorder = recordPlans(database.url);
  feature = createTestFeature(recorder.sql);
}, 60_000);
afterAll(async () => {
  await feature.close();
  await recorder.sql.end({ timeout: 2 });
  await database.close();
});

/** 10,000 servers with 80,000 GPUs, 100,000 allocations that ended, 8,000 that live, and their events. */
async function grow(): Promise<void> {
  const sql = database.sql;
  await sql.unsafe(`
    set local statement_timeout = 0; set local enable_hashjoin = on; set local enable_seqscan = on;
    insert into servers (id, name, state) select uuidv7(), 'bulk-' || n, 'available' from generate_series(1, 9998) n;
    insert into gpus (id, server_id, uuid, index, model, pci_bus_id, memory_bytes, inventory, health, mig_enabled)
      select uuidv7(), servers.id, 'GPU-' || gen_random_uuid(), n, 'NVIDIA H100 80GB HBM3', '0' || n, 85520809984, '{}',
        'healthy', false
      from servers cross join generate_series(0, 7) n where servers.name like 'bulk-%';
    create temporary table bulk on commit drop as
      select n, uuidv7() as id, gpu.id as gpu_id, gpu.server_id
      from generate_series(0, 107999) n
      join (select id, server_id, row_number() over (order by id desc) as place from gpus) gpu on gpu.place = n % 70000 + 1;
    insert into allocations (id, tenant_id, state, end_reason, request, lease_seconds, server_id, scheduled_at, active_at,
        expires_at, ended_at)
      select id, '${caller.tenantId ?? ""}', case when n < 8000 then 'active' else 'ended' end,
        case when n >= 8000 then 'released' end, '{"gpus": {"count": 1}}', 3600, server_id, now(), now(), now(),
        case when n >= 8000 then now() end
      from bulk;
    insert into claims (id, allocation_id, server_id, gpu_id, mode, usage_ended_at, released_at)
      select uuidv7(), id, server_id, gpu_id, 'whole', case when n >= 8000 then now() end, case when n >= 8000 then now() end
      from bulk;
    insert into reconcile_queue (kind, key, due_at) select 'allocation', id, now() + interval '1 hour' from bulk where n < 8000;
    with head as (update event_cursors set seq = seq + 108000 where name = 'sequence' returning seq - 108000 as seq)
    insert into events (seq, id, type, severity, tenant_id, server_id, allocation_id, actor, message, data, occurred_at)
      select head.seq + n + 1, uuidv7(), 'allocation.active', 'info', '${caller.tenantId ?? ""}', server_id, bulk.id, 'system', '', '{}', now()
      from bulk, head`);
}

async function observe(serverId: string, id: string, phase: WorkloadObserved_Phase): Promise<void> {
  const document = (await feature.agentPort.loadDesiredStates([serverId])).get(serverId);
  await feature.agentPort.observe(
    serverId,
    {
      incarnation: document?.incarnation ?? "",
      generation: document?.generation ?? 0,
      workloads: [workloadReport(id, phase)],
      conditions: [],
    },
    seededSessionEpoch,
  );
}

/** An allocation from its request to the end, as often as it takes to see generic plans; those of the last round. */
async function lifeOfAnAllocation(): Promise<ExecutedPlan[]> {
  for (let round = 0; round < executions; round += 1) {
    recorder.take();
    const { allocation } = await feature.service.create(caller, testRequest(), {
      idempotencyKey: `key-${performance.now()}`,
    });
    await feature.scheduler.runOnce();
    const { server_id: serverId } = await feature.service.get(caller, allocation.id);
    if (serverId === null) throw new Error("not placed");
    await observe(serverId, allocation.id, WorkloadObserved_Phase.PULLING);
    await observe(serverId, allocation.id, WorkloadObserved_Phase.RUNNING);
    await feature.service.extend(caller, allocation.id, 60);
    await feature.service.release(caller, allocation.id);
    await observe(serverId, allocation.id, WorkloadObserved_Phase.CLEAN);
    await feature.reconciler.runOnce();
    await sequenceOutbox(recorder.sql);
  }
  return recorder.take();
}

const wholeReads = (plans: readonly ExecutedPlan[]): string[] =>
  plans.flatMap(({ query, scanned }) => {
    const tables = scanned.filter((table) => growing.test(table) && !small.has(table));
    return tables.length === 0 ? [] : [`${tables.join()}: ${query.replaceAll(/\s+/g, " ").trim()}`];
  });

describe("statements of an allocation's life", () => {
  test("read no growing table whole: with plans made when tables were small, and with new ones", async () => {
    await lifeOfAnAllocation();
    await grow();
    const before = await lifeOfAnAllocation();
    expect(before.length).toBeGreaterThan(15);
    const wide = before
      .filter((plan) => plan.durationMs > 50)
      .map((plan) => `${plan.durationMs} ms: ${plan.query}`);
    expect(wide).toEqual([]);

    await database.sql`analyze`;
    expect(wholeReads(await lifeOfAnAllocation())).toEqual([]);
  }, 180_000);

  test("lists of events find the few that there are of a type, a severity or a GPU", async () => {
    const gpuId = "01900000-0000-7000-8000-0000000000aa";
    const filters: EventFilter[] = [{ typePrefixes: ["gpu.", "x"] }, { severities: ["error"] }, { gpuId }];
    for (const filter of filters) {
      for (let round = 0; round < executions; round += 1) {
        recorder.take();
        await listEvents(recorder.sql, { limit: 50, order: "descending", filter });
      }
      const plans = recorder.take();
      expect(plans.length).toBeGreaterThan(0);
      const slow = plans.filter((plan) => plan.durationMs > 10);
      expect(slow, JSON.stringify(filter)).toEqual([]);
    }
  });

  test("a statement that does is noticed", async () => {
    recorder.take();
    await recorder.sql`select count(*) from allocations where name = 'x'`;
    expect(wholeReads(recorder.take())).toHaveLength(1);
  });
});
