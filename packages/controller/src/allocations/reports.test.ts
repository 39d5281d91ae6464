import {
  WorkloadObserved_Phase,
  type ObservedState,
} from "@palebluedot/shared/generated/palebluedot/agent/v1/agent.ts";
import { afterEach, beforeEach, expect, test } from "vitest";
import { createTestDatabase, type TestDatabase } from "../db/testing.ts";
import {
  createTestFeature,
  seededSessionEpoch,
  seedServers,
  seedTenant,
  testRequest,
  workloadReport,
  type SeededServer,
  type TestFeature,
} from "./testing.ts";
import type { AllocationCaller } from "./types.ts";

let database: TestDatabase;
let feature: TestFeature;
let caller: AllocationCaller;
let servers: SeededServer[];

beforeEach(async () => {
  database = await createTestDatabase();
  feature = createTestFeature(database.sql);
  caller = { tenantId: await seedTenant(database.sql), actor: "token:test" };
  servers = await seedServers(database.sql, { count: 2, gpus: 1 });
});
afterEach(async () => {
  await feature.close();
  await database.close();
});

const { RUNNING, CLEAN, PULLING, EXITED } = WorkloadObserved_Phase;

/** An allocation on each of the two servers, in the servers' order. */
async function onePerServer(): Promise<[string, string]> {
  const ids = [];
  for (let n = 0; n < 2; n += 1)
    ids.push((await feature.service.create(caller, testRequest())).allocation.id);
  await feature.scheduler.runOnce();
  const placed = await Promise.all(ids.map((id) => feature.service.get(caller, id)));
  const of = (server: SeededServer | undefined): string =>
    placed.find((one) => one.server_id === server?.id)?.id ?? "not placed";
  return [of(servers[0]), of(servers[1])];
}

async function picture(
  serverId: string,
  ...workloads: ReturnType<typeof workloadReport>[]
): Promise<ObservedState> {
  const document = (await feature.agentPort.loadDesiredStates([serverId])).get(serverId);
  return {
    incarnation: document?.incarnation ?? "",
    generation: document?.generation ?? 0,
    workloads,
    conditions: [],
  };
}

const stateOf = async (id: string): Promise<string> => (await feature.service.get(caller, id)).state;
const dropped = (): Promise<string> =>
  feature.metrics.getSingleMetricAsString("palebluedot_allocation_reports_dropped_total");

test("what a server says of another's allocation counts for nothing, also while the other one reports", async () => {
  const [liar, honest] = servers.map((server) => server.id);
  const [own, foreign] = await onePerServer();
  if (liar === undefined || honest === undefined) throw new Error("two servers");
  const truth = await picture(honest, workloadReport(foreign, PULLING));
  const lie = await picture(liar, workloadReport(own, RUNNING), workloadReport(foreign, RUNNING));
  // One batch, in either order.
  await Promise.all([
    feature.agentPort.observe(liar, lie, seededSessionEpoch),
    feature.agentPort.observe(honest, truth, seededSessionEpoch),
  ]);
  expect([await stateOf(own), await stateOf(foreign)]).toEqual(["active", "provisioning"]);
  await feature.service.release(caller, foreign);
  const clean = await picture(liar, workloadReport(foreign, CLEAN));
  const stopping = await picture(honest, workloadReport(foreign, EXITED));
  await Promise.all([
    feature.agentPort.observe(honest, stopping, seededSessionEpoch),
    feature.agentPort.observe(liar, clean, seededSessionEpoch),
  ]);
  expect(await stateOf(foreign)).toBe("releasing");
  expect(await dropped()).toContain('reason="not-on-this-server"} 2');
});

async function setEpoch(serverId: string, epoch: number): Promise<void> {
  await database.sql`update servers set session_epoch = ${epoch} where id = ${serverId}`;
}

test("a session that was fenced says nothing any more, of whatever kind", async () => {
  const serverId = servers[0]?.id ?? "";
  const [id] = await onePerServer();
  await setEpoch(serverId, 8);
  const before = await database.sql`select * from servers where id = ${serverId}`;
  await feature.agentPort.observe(serverId, await picture(serverId, workloadReport(id, RUNNING)), 7);
  // Nor one of the future: that epoch was never given out.
  await feature.agentPort.observe(serverId, await picture(serverId, workloadReport(id, RUNNING)), 9);
  expect(await stateOf(id)).toBe("scheduled");
  expect(await database.sql`select * from servers where id = ${serverId}`).toEqual(before);
  await feature.agentPort.observe(serverId, await picture(serverId, workloadReport(id, RUNNING)), 8);
  expect(await stateOf(id)).toBe("active");
  expect(await dropped()).toContain('reason="fenced"} 2');
});

test("a fenced session's late picture does not displace the newer session's in the same batch", async () => {
  const serverId = servers[0]?.id ?? "";
  const [id] = await onePerServer();
  await setEpoch(serverId, 8);
  const newer = await picture(serverId, workloadReport(id, RUNNING));
  const late = await picture(serverId, workloadReport(id, EXITED, { exitCode: 1 }));
  await Promise.all([
    feature.agentPort.observe(serverId, newer, 8),
    feature.agentPort.observe(serverId, late, 7),
  ]);
  expect(await stateOf(id)).toBe("active");
});

test("a session that starts between the look and the write fences the write", async () => {
  const serverId = servers[0]?.id ?? "";
  const [id, other] = await onePerServer();
  const otherServer = servers[1]?.id ?? "";
  const old = await picture(serverId, workloadReport(id, RUNNING));
  const fine = await picture(otherServer, workloadReport(other, RUNNING));
  let reports: Promise<unknown> | undefined;
  await database.sql.begin(async (tx) => {
    // The new session holds the row, as its start does; the reports have read the old epoch and wait for it.
    await tx`update servers set session_epoch = session_epoch + 1 where id = ${serverId}`;
    reports = Promise.all([
      feature.agentPort.observe(serverId, old, seededSessionEpoch),
      feature.agentPort.observe(otherServer, fine, seededSessionEpoch),
    ]);
    const deadline = Date.now() + 10_000;
    for (;;) {
      const [waiting] = await tx<{ n: number }[]>`
        select count(*)::int as n from pg_locks where not granted and transactionid is not null`;
      if ((waiting?.n ?? 0) > 0) break;
      if (Date.now() > deadline) throw new Error("nobody waits for the server's row");
    }
  });
  await reports;
  expect([await stateOf(id), await stateOf(other)]).toEqual(["scheduled", "active"]);
});
