import { setTimeout as delay } from "node:timers/promises";
import { systemClock } from "@palebluedot/shared/clock.ts";
import {
  WorkloadDesired_Target,
  WorkloadObserved_Phase,
} from "@palebluedot/shared/generated/palebluedot/agent/v1/agent.ts";
import { afterEach, beforeEach, describe, expect, test } from "vitest";
import { createTestDatabase, type TestDatabase } from "../db/testing.ts";
import {
  createTestAgent,
  createTestFeature,
  seededSessionEpoch,
  seedServers,
  seedTenant,
  testRequest,
  workloadReport,
  type SeededServer,
  type TestFeature,
} from "./testing.ts";
import { allocationMetrics } from "./metrics.ts";
import { countOverdue } from "./overdue-count.ts";
import type { AllocationCaller } from "./types.ts";

let database: TestDatabase;
let feature: TestFeature;
let now = 0;
let caller: AllocationCaller;
let servers: SeededServer[];

beforeEach(async () => {
  now = Date.parse("2026-11-01T00:00:00Z");
  database = await createTestDatabase();
  feature = createTestFeature(database.sql, { clock: { ...systemClock, now: () => now } });
  caller = { tenantId: await seedTenant(database.sql), actor: "token:test" };
  servers = await seedServers(database.sql, { count: 2, gpus: 4 });
});
afterEach(async () => {
  await feature.close();
  await database.close();
});

const first = (): SeededServer => {
  const [server] = servers;
  if (server === undefined) throw new Error("no server");
  return server;
};

async function observe(serverId: string, ...workloads: ReturnType<typeof workloadReport>[]): Promise<void> {
  const document = (await feature.agentPort.loadDesiredStates([serverId])).get(serverId);
  await feature.agentPort.observe(
    serverId,
    {
      incarnation: document?.incarnation ?? "",
      generation: document?.generation ?? 0,
      workloads,
      conditions: [],
    },
    seededSessionEpoch,
  );
}

async function eventTypes(): Promise<string[]> {
  const rows = await database.sql<{ type: string }[]>`select type from outbox order by occurred_at, id`;
  return rows.map((row) => row.type);
}

async function scheduled(gpus = 1): Promise<{ id: string; serverId: string }> {
  const { allocation } = await feature.service.create(caller, testRequest({ count: gpus }));
  await feature.scheduler.runOnce();
  const { server_id: serverId, id } = await feature.service.get(caller, allocation.id);
  if (serverId === null) throw new Error("not scheduled");
  return { id, serverId };
}

describe("the life of an allocation", () => {
  test("queued, scheduled, provisioning, active, releasing, ended; then its GPUs are free again", async () => {
    const { allocation, created } = await feature.service.create(
      caller,
      testRequest({ count: 4 }, { name: "train", lease_seconds: 3600 }),
    );
    expect(created).toBe(true);
    expect(allocation).toMatchObject({ state: "queued", gpus: [], server_id: null });
    expect(await feature.service.get(caller, allocation.id)).toEqual(allocation);

    expect(await feature.scheduler.runOnce()).toBe(1);
    const placed = await feature.service.get(caller, allocation.id);
    expect(placed).toMatchObject({ state: "scheduled", message: "" });
    expect(placed.gpus.map((gpu) => gpu.index)).toEqual([0, 1, 2, 3]);
    const serverId = placed.server_id ?? "";
    expect(feature.pushed).toEqual([serverId]);

    const document = (await feature.agentPort.loadDesiredStates([serverId])).get(serverId);
    expect(document).toMatchObject({ generation: 1, drain: false });
    expect(document?.workloads).toMatchObject([
      {
        allocationId: allocation.id,
        target: WorkloadDesired_Target.RUNNING,
        container: { image: "busybox" },
      },
    ]);
    expect(document?.workloads[0]?.gpuUuids).toEqual(placed.gpus.map((gpu) => gpu.uuid));

    await observe(serverId, workloadReport(allocation.id, WorkloadObserved_Phase.PULLING));
    expect(await feature.service.get(caller, allocation.id)).toMatchObject({
      state: "provisioning",
      message: "the server is pulling the image",
      observed: { phase: "pulling" },
    });
    now += 1000;
    const running = workloadReport(allocation.id, WorkloadObserved_Phase.RUNNING, {
      containerId: "c1",
      startedAtUnixMs: now,
      ports: [{ containerPort: 80, hostPort: 32_000, protocol: "tcp" }],
    });
    await observe(serverId, running);
    await observe(serverId, running);
    expect(await feature.service.get(caller, allocation.id)).toMatchObject({
      state: "active",
      active_at: new Date(now).toISOString(),
      expires_at: new Date(now + 3_600_000).toISOString(),
      observed: {
        phase: "running",
        container_id: "c1",
        ports: [{ container_port: 80, host_port: 32_000, protocol: "tcp" }],
      },
    });

    now += 1000;
    const releasing = await feature.service.release(caller, allocation.id);
    expect(releasing).toMatchObject({ state: "releasing", end_reason: "released" });
    expect(await feature.service.release(caller, allocation.id)).toEqual(releasing);
    const reclaim = (await feature.agentPort.loadDesiredStates([serverId])).get(serverId);
    expect(reclaim).toMatchObject({
      generation: 2,
      workloads: [{ target: WorkloadDesired_Target.RECLAIMED }],
    });
    const [usage] = await database.sql`select distinct usage_ended_at, released_at from claims`;
    expect(usage).toEqual({ usage_ended_at: new Date(now), released_at: null });

    // Nothing is handed on before the server was verified clean.
    await feature.service.create(caller, testRequest({ count: 4, server_id: serverId }));
    expect(await feature.scheduler.runOnce()).toBe(0);

    await observe(
      serverId,
      workloadReport(allocation.id, WorkloadObserved_Phase.DIRTY, {
        holders: [
          { gpuUuid: placed.gpus[0]?.uuid ?? "", pid: 77, processName: "python", memoryUsedBytes: 5 },
        ],
      }),
    );
    expect((await feature.service.get(caller, allocation.id)).message).toBe(
      "released; the server is not clean yet: process 77 (python)",
    );
    expect(await feature.scheduler.runOnce()).toBe(0);

    now += 1000;
    await observe(serverId, workloadReport(allocation.id, WorkloadObserved_Phase.CLEAN));
    expect(await feature.service.get(caller, allocation.id)).toMatchObject({
      state: "ended",
      end_reason: "released",
      message: "released",
      ended_at: new Date(now).toISOString(),
    });
    expect(await feature.scheduler.runOnce()).toBe(1);
    expect(await eventTypes()).toEqual([
      "allocation.queued",
      "allocation.scheduled",
      "allocation.provisioning",
      "allocation.active",
      "allocation.releasing",
      "allocation.queued",
      "allocation.dirty",
      "allocation.ended",
      "allocation.scheduled",
    ]);
  });

  test.each([
    ["exit code 0", { exitCode: 0 }, "released", "exit code 0"],
    ["exit code 3", { exitCode: 3 }, "failed", "exit code 3"],
    ["out of memory", { exitCode: 137, oomKilled: true }, "failed", "ran out of memory"],
  ] as const)("a container that ends by itself with %s", async (_name, report, reason, words) => {
    const { id, serverId } = await scheduled();
    await observe(serverId, workloadReport(id, WorkloadObserved_Phase.RUNNING));
    await observe(serverId, workloadReport(id, WorkloadObserved_Phase.EXITED, report));
    const after = await feature.service.get(caller, id);
    expect(after).toMatchObject({ state: "releasing", end_reason: reason });
    expect(after.message).toContain(words);
    await observe(serverId, workloadReport(id, WorkloadObserved_Phase.CLEAN));
    expect(await feature.service.get(caller, id)).toMatchObject({ state: "ended", message: after.message });
  });

  test("a refused container says why", async () => {
    const { id, serverId } = await scheduled();
    const report = { reason: "refused-privileged", message: "privileged containers are not allowed" };
    await observe(serverId, workloadReport(id, WorkloadObserved_Phase.FAILED, report));
    expect(await feature.service.get(caller, id)).toMatchObject({
      state: "releasing",
      end_reason: "failed",
      message:
        "the container could not be started: privileged containers are not allowed (refused-privileged)",
    });
  });

  test("how it ended and the end of its output outlive the container", async () => {
    const { id, serverId } = await scheduled();
    const outputTail = Buffer.from("hello\n");
    const exited = workloadReport(id, WorkloadObserved_Phase.EXITED, { exitCode: 3, outputTail });
    await observe(serverId, exited);
    await observe(serverId, exited);
    expect(await feature.service.get(caller, id)).toMatchObject({ state: "releasing", end_reason: "failed" });
    // An agent of an earlier release forgets both when it cleans up.
    await observe(serverId, workloadReport(id, WorkloadObserved_Phase.VERIFYING));
    await observe(serverId, workloadReport(id, WorkloadObserved_Phase.CLEAN));
    const ended = await feature.service.get(caller, id);
    expect(ended).toMatchObject({ state: "ended", observed: { phase: "clean", exit_code: 3 } });
    expect(JSON.stringify(ended)).not.toContain("output_tail");
    expect(await feature.service.outputTail(caller, id)).toEqual(outputTail);
    const other = { tenantId: await seedTenant(database.sql), actor: "token:other" };
    await expect(feature.service.outputTail(other, id)).rejects.toMatchObject({
      code: "allocation-not-found",
    });
  });

  test("an agent's idea of a short output is not trusted", async () => {
    const { id, serverId } = await scheduled();
    const outputTail = Buffer.concat([Buffer.alloc(100_000, "a"), Buffer.from([0, 255]), Buffer.from("end")]);
    await observe(serverId, workloadReport(id, WorkloadObserved_Phase.EXITED, { exitCode: 0, outputTail }));
    const kept = await feature.service.outputTail(caller, id);
    expect(kept).toEqual(outputTail.subarray(-16 * 1024));
  });

  test("every event of its life says something", async () => {
    const { id, serverId } = await scheduled();
    await observe(serverId, workloadReport(id, WorkloadObserved_Phase.RUNNING));
    await feature.service.extend(caller, id, 60);
    await feature.service.release(caller, id);
    await observe(serverId, workloadReport(id, WorkloadObserved_Phase.CLEAN));
    const told = await database.sql<{ type: string; message: string }[]>`
      select type, message from outbox where allocation_id = ${id}`;
    expect(told.map(({ type }) => type.replace("allocation.", "")).sort()).toEqual(
      ["queued", "scheduled", "active", "extended", "releasing", "ended"].sort(),
    );
    expect(told.filter(({ message }) => message === "")).toEqual([]);
    expect((await feature.service.get(caller, id)).message).toBe("released");
  });

  test("cancelled in the queue it never holds anything", async () => {
    const { allocation } = await feature.service.create(caller, testRequest());
    expect(await feature.service.release(caller, allocation.id)).toMatchObject({
      state: "ended",
      end_reason: "cancelled",
    });
    expect(await feature.scheduler.runOnce()).toBe(0);
    expect(await database.sql`select from claims`).toHaveLength(0);
    expect(await database.sql`select from reconcile_queue`).toHaveLength(0);
  });
});

describe("what an agent says is judged", () => {
  test("reports about foreign, ended and unknown allocations, CLEAN while running, and another incarnation change nothing", async () => {
    const { id, serverId } = await scheduled();
    const other = servers.find((server) => server.id !== serverId)?.id ?? "";
    await observe(other, workloadReport(id, WorkloadObserved_Phase.RUNNING));
    await observe(serverId, workloadReport(id, WorkloadObserved_Phase.CLEAN));
    await observe(serverId, workloadReport("not-even-an-id", WorkloadObserved_Phase.RUNNING));
    await feature.agentPort.observe(
      serverId,
      {
        incarnation: "00000000-0000-0000-0000-000000000000",
        generation: 99,
        workloads: [workloadReport(id, WorkloadObserved_Phase.RUNNING)],
        conditions: [],
      },
      seededSessionEpoch,
    );
    expect(await feature.service.get(caller, id)).toMatchObject({ state: "scheduled" });
    const dropped = await feature.metrics.getSingleMetricAsString(
      "palebluedot_allocation_reports_dropped_total",
    );
    expect(dropped).toContain('reason="not-on-this-server"} 2');
    expect(dropped).toContain('reason="incarnation"} 1');

    await feature.service.release(caller, id);
    await observe(serverId, workloadReport(id, WorkloadObserved_Phase.RUNNING));
    expect(await feature.service.get(caller, id)).toMatchObject({ state: "releasing" });
    await observe(serverId, workloadReport(id, WorkloadObserved_Phase.CLEAN));
    await observe(serverId, workloadReport(id, WorkloadObserved_Phase.RUNNING));
    expect(await feature.service.get(caller, id)).toMatchObject({ state: "ended" });
  });

  test("control characters, NUL and absurd numbers in a report are stored harmlessly", async () => {
    const { id, serverId } = await scheduled();
    await observe(
      serverId,
      workloadReport(id, WorkloadObserved_Phase.FAILED, {
        message: `bad\0\ud800${"x".repeat(100_000)}`,
        startedAtUnixMs: Number.MAX_SAFE_INTEGER,
        holders: Array.from({ length: 1000 }, () => ({
          gpuUuid: "\0",
          pid: 1,
          processName: "p",
          memoryUsedBytes: 1,
        })),
      }),
    );
    const after = await feature.service.get(caller, id);
    expect(after.state).toBe("releasing");
    expect(after.observed.message?.length).toBeLessThanOrEqual(2048);
    expect(after.observed.holders).toHaveLength(64);
  });
});

/** What the reconciler makes of it, looking every five minutes for so long. */
async function stateAfter(id: string, minutes: number): Promise<string> {
  for (let passed = 0; passed < minutes; passed += 5) {
    now += 300_000;
    await feature.reconciler.runOnce();
  }
  return (await feature.service.get(caller, id)).state;
}

const overdueStarts = async (): Promise<number> =>
  (await countOverdue(database.sql, allocationMetrics(feature.metrics), now))["provisioning"] ?? 0;

describe("time", () => {
  test("a lease that ran out releases; an extended one does not", async () => {
    const one = await scheduled();
    const two = await scheduled();
    for (const { id, serverId } of [one, two]) {
      await observe(serverId, workloadReport(id, WorkloadObserved_Phase.RUNNING));
    }
    const extended = await feature.service.extend(caller, two.id, 7200);
    expect(extended.lease_seconds).toBe(86_400 + 7200);
    expect(extended.expires_at).toBe(new Date(now + 93_600_000).toISOString());
    now += 86_400_000 - 1;
    await feature.reconciler.runOnce();
    expect((await feature.service.get(caller, one.id)).state).toBe("active");
    now += 1;
    await feature.reconciler.runOnce();
    expect(await feature.service.get(caller, one.id)).toMatchObject({
      state: "releasing",
      end_reason: "expired",
    });
    expect((await feature.service.get(caller, two.id)).state).toBe("active");
    now += 7_200_000;
    await feature.reconciler.runOnce();
    expect((await feature.service.get(caller, two.id)).end_reason).toBe("expired");
  });

  test("a start that takes too long fails with what was last heard", async () => {
    const { id, serverId } = await scheduled();
    await observe(serverId, workloadReport(id, WorkloadObserved_Phase.ACCEPTED));
    now += 300_000;
    await feature.reconciler.runOnce();
    const after = await feature.service.get(caller, id);
    expect(after).toMatchObject({ state: "releasing", end_reason: "failed" });
    expect(after.message).toMatch(/did not start the container within 5 minutes; last heard: .*taken/);
  });

  test("a large image may take an hour while its server says that it pulls, and no longer", async () => {
    const { id, serverId } = await scheduled();
    await observe(serverId, workloadReport(id, WorkloadObserved_Phase.PULLING));
    expect(await stateAfter(id, 40)).toBe("provisioning");
    expect(await overdueStarts()).toBe(0);
    await observe(serverId, workloadReport(id, WorkloadObserved_Phase.CREATING));
    expect(await stateAfter(id, 15)).toBe("provisioning");
    expect(await stateAfter(id, 5)).toBe("releasing");
    const after = await feature.service.get(caller, id);
    expect(after.message).toMatch(/did not start the container within 60 minutes; last heard: .*creating/);
  });

  test("a server that falls silent while it pulls has five minutes to come back", async () => {
    const { id, serverId } = await scheduled();
    await observe(serverId, workloadReport(id, WorkloadObserved_Phase.PULLING));
    expect(await stateAfter(id, 20)).toBe("provisioning");
    const { sql } = database;
    await sql`
      update servers set disconnected_at = ${new Date(now)}, conditions = '{"unreachable": {"status": "failed"}}'
      where id = ${serverId}`;
    now += 299_000;
    await feature.reconciler.runOnce();
    expect((await feature.service.get(caller, id)).state).toBe("provisioning");
    now += 301_000;
    await feature.reconciler.runOnce();
    const after = await feature.service.get(caller, id);
    expect(after).toMatchObject({ state: "releasing", end_reason: "failed" });
    expect(after.message).toMatch(/is unreachable/);
  });

  test("a release that does not come clean is made known again and again, and holds on to its GPUs", async () => {
    const { id } = await scheduled();
    await feature.service.release(caller, id);
    for (const minutes of [10, 20, 40]) {
      now += minutes * 60_000;
      await feature.reconciler.runOnce();
    }
    expect((await eventTypes()).filter((type) => type === "allocation.overdue")).toHaveLength(3);
    expect(await feature.service.get(caller, id)).toMatchObject({ state: "releasing" });
    expect(await database.sql`select from claims where released_at is null`).toHaveLength(1);
  });

  test("what is overdue is counted by state, and no more when it is done", async () => {
    const { id, serverId } = await scheduled();
    await observe(serverId, workloadReport(id, WorkloadObserved_Phase.RUNNING));
    await feature.service.release(caller, id);
    const { sql } = database;
    const counted = async (): Promise<string[]> => {
      await countOverdue(sql, allocationMetrics(feature.metrics), now);
      const text = await feature.metrics.metrics();
      return text
        .split("\n")
        .filter((line) => line.startsWith('palebluedot_allocations_overdue{state="releasing"'));
    };
    now += 9 * 60_000;
    expect(await counted()).toEqual([`palebluedot_allocations_overdue{state="releasing"} 0`]);
    now += 2 * 60_000;
    expect(await counted()).toEqual([`palebluedot_allocations_overdue{state="releasing"} 1`]);
    await observe(serverId, workloadReport(id, WorkloadObserved_Phase.CLEAN));
    expect(await counted()).toEqual([`palebluedot_allocations_overdue{state="releasing"} 0`]);
  });

  test("a lease longer than 30 days and the extension of an ended allocation are refused", async () => {
    const { id } = await scheduled();
    await expect(feature.service.extend(caller, id, 30 * 86_400)).rejects.toMatchObject({
      code: "lease-too-long",
    });
    await feature.service.release(caller, id);
    await expect(feature.service.extend(caller, id, 60)).rejects.toMatchObject({
      code: "allocation-not-live",
    });
  });
});

describe("requests", () => {
  test("one key, many simultaneous tries: one allocation; another body is refused", async () => {
    const request = testRequest({ count: 2 });
    const tries = await Promise.all(
      Array.from({ length: 50 }, () => feature.service.create(caller, request, { idempotencyKey: "k1" })),
    );
    expect(new Set(tries.map((result) => result.allocation.id)).size).toBe(1);
    expect(tries.filter((result) => result.created)).toHaveLength(1);
    await expect(
      feature.service.create(caller, testRequest({ count: 3 }), { idempotencyKey: "k1" }),
    ).rejects.toMatchObject({ code: "idempotency-key-reused", status: 422 });
    // Another tenant's key is its own.
    const other = { tenantId: await seedTenant(database.sql), actor: "token:other" };
    expect((await feature.service.create(other, testRequest(), { idempotencyKey: "k1" })).created).toBe(true);
    // After a day a key is free, whether or not it was purged.
    await database.sql`update idempotency_keys set created_at = now() - interval '25 hours'`;
    const later = await feature.service.create(caller, testRequest({ count: 3 }), { idempotencyKey: "k1" });
    expect(later.created).toBe(true);
  });

  test("a batch with an unknown tenant fails for that one alone", async () => {
    const admin: AllocationCaller = { tenantId: undefined, actor: "token:admin" };
    const results = await Promise.allSettled([
      feature.service.create(admin, testRequest({}, { tenant_id: caller.tenantId })),
      feature.service.create(admin, testRequest({}, { tenant_id: "0190a0a0-0000-7000-8000-000000000000" })),
      feature.service.create(admin, testRequest()),
      feature.service.create(caller, testRequest({}, { tenant_id: "0190a0a0-0000-7000-8000-000000000000" })),
    ]);
    expect(
      results.map((result) =>
        result.status === "rejected" ? (result.reason as { code: string }).code : "ok",
      ),
    ).toEqual(["ok", "tenant-not-found", "tenant-required", "tenant-forbidden"]);
  });

  test("another tenant's allocation does not exist", async () => {
    const { id } = await scheduled();
    const other: AllocationCaller = { tenantId: await seedTenant(database.sql), actor: "token:other" };
    for (const attempt of [
      () => feature.service.get(other, id),
      () => feature.service.release(other, id),
      () => feature.service.extend(other, id, 60),
    ]) {
      await expect(attempt()).rejects.toMatchObject({ code: "allocation-not-found" });
    }
    expect(await feature.service.list(other, { limit: 10 })).toEqual([]);
    expect(await feature.service.list({ ...other, tenantId: undefined }, { limit: 10 })).toHaveLength(1);
  });

  test("lists in pages, newest first", async () => {
    const ids: string[] = [];
    for (let count = 0; count < 5; count += 1) {
      ids.unshift((await feature.service.create(caller, testRequest())).allocation.id);
    }
    const page1 = await feature.service.list(caller, { limit: 3 });
    const page2 = await feature.service.list(caller, { limit: 3, afterId: page1.at(-1)?.id });
    expect([...page1, ...page2].map((allocation) => allocation.id)).toEqual(ids);
    expect(await feature.service.list(caller, { limit: 3, states: ["active"] })).toEqual([]);
  });

  test("secrets reach the agent and nobody else, and are wiped at the end", async () => {
    const { allocation } = await feature.service.create(
      caller,
      testRequest(
        {},
        {
          container: {
            image: "busybox",
            environment: { PLAIN: "1" },
            secret_environment: { TOKEN: "hunter2-secret" },
            registry: { server: "r.example", username: "u", password: "hunter3-secret" },
          },
        },
      ),
    );
    await feature.scheduler.runOnce();
    const shown = await feature.service.get(caller, allocation.id);
    expect(shown.request.container).toMatchObject({
      secret_environment_names: ["TOKEN"],
      registry: { server: "r.example", username: "u" },
    });
    const serverId = shown.server_id ?? "";
    const container = (await feature.agentPort.loadDesiredStates([serverId])).get(serverId)?.workloads[0]
      ?.container;
    expect(container?.environment).toEqual([
      { name: "PLAIN", value: "1", secret: false },
      { name: "TOKEN", value: "hunter2-secret", secret: true },
    ]);
    expect(container?.registry?.password).toBe("hunter3-secret");
    const dump = async (): Promise<string> =>
      JSON.stringify([
        await database.sql`select allocations::text from allocations`,
        await database.sql`select outbox::text from outbox`,
        shown,
      ]);
    expect(await dump()).not.toMatch(/hunter[23]/);
    await feature.service.release(caller, allocation.id);
    await observe(serverId, workloadReport(allocation.id, WorkloadObserved_Phase.CLEAN));
    expect(await database.sql`select from allocations where secrets_encrypted is not null`).toHaveLength(0);
  });
});

describe("the running feature", () => {
  test("a released GPU goes to the one that waits, who was told why", async () => {
    const agents = servers.map((server) => createTestAgent(server.id));
    feature.start();
    const all = await Promise.all(
      Array.from({ length: 9 }, () => feature.service.create(caller, testRequest({ count: 1 }))),
    );
    const until = async (check: () => Promise<boolean>, what: string): Promise<void> => {
      for (const deadline = performance.now() + 20_000; performance.now() < deadline; await delay(10)) {
        if (await check()) return;
        for (const agent of agents) await agent.sync(feature.agentPort);
      }
      throw new Error(`did not happen: ${what}`);
    };
    const inState = async (...states: ("active" | "queued" | "ended")[]): Promise<string[]> =>
      (await feature.service.list(caller, { limit: 50, states })).map((allocation) => allocation.id);
    await until(async () => (await inState("active")).length === 8, "eight run");
    const [waiting = ""] = await inState("queued");
    await until(
      async () =>
        (await feature.service.get(caller, waiting)).message.includes("free: 2 servers could hold it"),
      "told why it waits",
    );
    const [running = ""] = await inState("active");
    await feature.service.release(caller, running);
    await until(
      async () => (await feature.service.get(caller, waiting)).state === "active",
      "the ninth runs",
    );
    expect(all.every((result) => result.created)).toBe(true);
  });

  test("a closed server gets nothing; opened again it does", async () => {
    await database.sql`update servers set draining = true`;
    const { allocation } = await feature.service.create(caller, testRequest({ count: 2 }));
    expect(await feature.scheduler.runOnce()).toBe(0);
    expect((await feature.service.get(caller, allocation.id)).message).toContain("2 draining");
    await database.sql`
      update servers set draining = false,
        conditions = case when id = ${first().id} then '{"unreachable": {"status": "failed"}}'::jsonb else '{}' end`;
    feature.agentPort.capacityChanged(servers.map((server) => server.id));
    expect(await feature.scheduler.runOnce()).toBe(1);
    expect((await feature.service.get(caller, allocation.id)).server_id).not.toBe(first().id);
  });

  test("a server that is closed behind the scheduler's back is not used", async () => {
    await feature.scheduler.runOnce();
    await database.sql`update servers set state = 'maintenance' where id = ${first().id}`;
    await database.sql`update gpus set schedulable = false where server_id <> ${first().id} and index < 3`;
    const one = await feature.service.create(caller, testRequest({ count: 1 }));
    const two = await feature.service.create(caller, testRequest({ count: 2 }));
    expect(await feature.scheduler.runOnce()).toBe(1);
    const placed = await feature.service.get(caller, one.allocation.id);
    expect(placed.server_id).not.toBe(first().id);
    expect(placed.gpus.map((gpu) => gpu.index)).toEqual([3]);
    expect((await feature.service.get(caller, two.allocation.id)).state).toBe("queued");
  });

  test("two schedulers that both believe they lead share the fleet without a clash", async () => {
    const rival = createTestFeature(database.sql);
    await Promise.all([feature.scheduler.runOnce(), rival.scheduler.runOnce()]);
    await Promise.all(
      Array.from({ length: 12 }, (_, turn) =>
        (turn % 2 === 0 ? feature : rival).service.create(caller, testRequest({ count: 1 })),
      ),
    );
    for (let round = 0; round < 4; round += 1) {
      await Promise.all([feature.scheduler.runOnce(), rival.scheduler.runOnce()]);
    }
    expect(await database.sql`select distinct gpu_id from claims`).toHaveLength(8);
    expect(await database.sql`select from allocations where state = 'queued'`).toHaveLength(4);
    await rival.close();
  });
});
