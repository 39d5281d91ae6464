import { afterAll, beforeAll, expect, test } from "vitest";
import { WorkloadDesired_Target } from "@palebluedot/shared/generated/palebluedot/agent/v1/agent.ts";
import { createTestDatabase, type TestDatabase } from "../../packages/controller/src/db/testing.ts";
import {
  startAgentListeners,
  type AgentListeners,
} from "../../packages/controller/src/sessions/listeners.ts";
import {
  eventually,
  MemoryAllocations,
  testDependencies,
} from "../../packages/controller/src/sessions/testing.ts";
import { startFleet } from "../../packages/simulator/src/fleet/fleet.ts";

let database: TestDatabase;
let deps: ReturnType<typeof testDependencies>;
let listeners: AgentListeners;
const allocations = new MemoryAllocations();

beforeAll(async () => {
  database = await createTestDatabase();
  deps = testDependencies(database.sql);
  listeners = await startAgentListeners(deps, { allocations });
});

afterAll(async () => {
  await listeners?.stop();
  await deps?.close();
  await database?.close();
});

test("a simulated fleet enrols, becomes available, sends telemetry and starts what is desired", async () => {
  const { token } = await listeners.enrolment.createJoinToken(
    { name: "fleet", maxUses: 25, autoApprove: true },
    { name: "token:test" },
  );
  const starts = new Map<string, number>();
  const fleet = await startFleet({
    controller: `127.0.0.1:${listeners.enrolmentPort}`,
    caFingerprint: listeners.caFingerprint,
    joinToken: token,
    agents: 25,
    gpusPerServer: 8,
    telemetryIntervalMs: 200,
    onStartCommand: (id, at) => starts.set(id, at),
  });
  try {
    await fleet.ready(AbortSignal.timeout(20_000));
    await eventually(async () => {
      const [row] = await database.sql<{ n: number }[]>`
        select count(*)::int as n from servers where state = 'available'`;
      return row?.n === 25 || undefined;
    }, "25 available servers");
    const gpus = await database.sql<{ uuid: string; server_id: string }[]>`select uuid, server_id from gpus`;
    expect(gpus).toHaveLength(200);
    const [gpu] = gpus;
    if (gpu === undefined) throw new Error("no GPU");
    await eventually(() => listeners.telemetry.latest(gpu.uuid));

    const before = performance.timeOrigin + performance.now();
    allocations.desired.set(gpu.server_id, {
      incarnation: "i",
      generation: 1,
      drain: false,
      workloads: [
        {
          allocationId: "a-1",
          tenantId: "t",
          target: WorkloadDesired_Target.RUNNING,
          gpuUuids: [gpu.uuid],
          container: undefined,
        },
      ],
    });
    listeners.registry.desiredStateChanged([gpu.server_id]);
    const at = await eventually(() => starts.get("a-1"));
    expect(at).toBeGreaterThanOrEqual(before);
    await eventually(() => allocations.observed.find((one) => one.state.workloads.length === 1));
  } finally {
    await fleet.stop();
  }
  expect(fleet.connected()).toBe(0);
});
