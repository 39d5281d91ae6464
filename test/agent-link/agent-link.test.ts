import { spawnSync } from "node:child_process";
import { cpSync, mkdtempSync, readFileSync, rmSync, statSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterEach, beforeEach, describe, expect, test } from "vitest";
import {
  WorkloadDesired_Target,
  WorkloadObserved_Phase,
} from "@palebluedot/shared/generated/palebluedot/agent/v1/agent.ts";
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
import { startAgent, type AgentProcess } from "../../packages/simulator/src/cluster/agent.ts";
import { createSimulatedServer, type SimulatedServer } from "../../packages/simulator/src/server.ts";

/** The real agent as a process, the controller's real listeners on a real PostgreSQL. */
const operator = { name: "token:test" };
let dir: string;
let database: TestDatabase;
let deps: ReturnType<typeof testDependencies>;
let allocations: MemoryAllocations;
let listeners: AgentListeners;
let server: SimulatedServer;
const agents: AgentProcess[] = [];

beforeEach(async () => {
  dir = mkdtempSync(join(tmpdir(), "palebluedot-link-"));
  database = await createTestDatabase();
  deps = testDependencies(database.sql);
  allocations = new MemoryAllocations();
  listeners = await startAgentListeners(deps, { allocations, unreachableAfterMs: 500, presenceCheckMs: 200 });
  server = createSimulatedServer({ dir: join(dir, "server"), model: "l40s", count: 2 });
});

afterEach(async () => {
  await Promise.all(agents.splice(0).map((agent) => agent.kill()));
  await listeners.stop();
  await deps.close();
  await database.close();
  rmSync(dir, { recursive: true, force: true });
});

async function joinToken(autoApprove = true): Promise<string> {
  const made = await listeners.enrolment.createJoinToken({ name: "t", maxUses: 10, autoApprove }, operator);
  return made.token;
}

function start(
  token: string,
  name = "agent",
  wrap?: readonly string[],
  env: Record<string, string> = {},
): AgentProcess {
  const agent = startAgent({
    dataDir: join(dir, name),
    controller: `127.0.0.1:${listeners.enrolmentPort}`,
    caFingerprint: listeners.caFingerprint,
    joinToken: token,
    env: {
      ...server.env,
      // No engine: containers are other tests' business, and the agent must live without one.
      DOCKER_HOST: `unix://${join(dir, "no-engine.sock")}`,
      PALEBLUEDOT_TELEMETRY_INTERVAL_MS: "1000",
      ...env,
    },
    ...(wrap === undefined ? {} : { wrap }),
  });
  agents.push(agent);
  return agent;
}

async function waitFor<T>(
  agent: AgentProcess,
  what: string,
  look: () => T | Promise<T>,
): Promise<NonNullable<T>> {
  const deadline = Date.now() + 40_000;
  for (;;) {
    const value = await look();
    if (value !== undefined && value !== null && value !== false) return value;
    if (Date.now() > deadline || !agent.isRunning()) {
      throw new Error(`no ${what} (the agent runs: ${agent.isRunning()})\n${agent.logTail()}`);
    }
    await new Promise((resolve) => setTimeout(resolve, 50));
  }
}

interface ServerRow {
  id: string;
  state: string;
  conditions: Record<string, { status: string }>;
  serial: string | null;
}
const servers = (): Promise<ServerRow[]> =>
  database.sql<ServerRow[]>`select id, state, conditions, serial from servers order by id`;

const available = (agent: AgentProcess): Promise<ServerRow> =>
  waitFor(agent, "an available server", async () =>
    (await servers()).find((row) => row.state === "available"),
  );

test("an agent enrols, reports its GPUs and telemetry, and events arrive once", async () => {
  const agent = start(await joinToken());
  const row = await available(agent);
  expect(row.serial).toBe(server.identity.serial);
  const gpus = await database.sql<{ uuid: string; model: string; health: string }[]>`
    select uuid, model, health from gpus where server_id = ${row.id} order by index`;
  expect(gpus.map((gpu) => gpu.uuid)).toEqual(server.gpus.map((gpu) => gpu.uuid));
  const uuid = gpus[0]?.uuid ?? "";
  await waitFor(agent, "telemetry", () => listeners.telemetry.window(uuid, 0).length >= 2);
  expect(listeners.telemetry.latest(uuid)?.memoryUsedBytes).toBeGreaterThanOrEqual(0);
  const started = (): Promise<{ n: number }[]> =>
    database.sql<{ n: number }[]>`select count(*)::int as n from outbox where type = 'agent.started'`;
  await waitFor(agent, "the start event", async () => ((await started())[0]?.n ?? 0) === 1);

  for (const name of ["key.pem", "certificate.pem", "ca.pem", "enrolment.json"]) {
    expect(statSync(join(agent.dataDir, "identity", name)).mode & 0o777).toBe(0o600);
  }
  // Killed and started again: same server, no new enrolment, one more start event.
  await agent.kill();
  await eventually(async () => "unreachable" in ((await servers())[0]?.conditions ?? {}) || undefined);
  const again = agent.restart();
  agents.push(again);
  await waitFor(again, "the second start event", async () => ((await started())[0]?.n ?? 0) === 2);
  await waitFor(again, "reachable", async () => !("unreachable" in ((await servers())[0]?.conditions ?? {})));
  expect(await servers()).toHaveLength(1);
  expect(agent.logTail()).not.toContain("pbj_");
});

test("desired state reaches the agent, and what it observes comes back", async () => {
  const agent = start(await joinToken());
  const row = await available(agent);
  allocations.desired.set(row.id, {
    incarnation: "i",
    generation: 1,
    drain: false,
    workloads: [
      {
        allocationId: "01900000-0000-7000-8000-00000000000a",
        tenantId: "01900000-0000-7000-8000-00000000000b",
        target: WorkloadDesired_Target.RUNNING,
        gpuUuids: [server.gpus[0]?.uuid ?? ""],
        container: undefined,
      },
    ],
  });
  listeners.registry.desiredStateChanged([row.id]);
  const seen = await waitFor(agent, "an observation of generation 1", () =>
    allocations.observed.find((one) => one.state.generation === 1),
  );
  expect(seen.serverId).toBe(row.id);
  const workload = await waitFor(agent, "the workload", () =>
    allocations.observed.flatMap((one) => one.state.workloads).find((one) => one.allocationId.endsWith("a")),
  );
  // There is no engine: whatever is said, it is not that it runs.
  expect(workload.phase).not.toBe(WorkloadObserved_Phase.RUNNING);
});

test("a host without approval waits, and goes on when it is given", async () => {
  const agent = start(await joinToken(false));
  const [row] = await waitFor(agent, "a pending server", async () => {
    const rows = await servers();
    return rows.length === 1 ? rows : undefined;
  });
  expect(row?.state).toBe("pending");
  await listeners.enrolment.approveServer(row?.id ?? "", operator);
  await available(agent);
});

test("two agents on one identity fence each other and are reported", async () => {
  const first = start(await joinToken());
  const row = await available(first);
  cpSync(first.dataDir, join(dir, "clone"), { recursive: true });
  const clone = start(await joinToken(), "clone");
  await waitFor(clone, "the first agent to be fenced", () =>
    first.logTail().includes("another agent uses this"),
  );
  expect(listeners.registry.isConnected(row.id)).toBe(true);
  expect(await servers()).toHaveLength(1);
});

test("a wrong CA fingerprint is not trusted", async () => {
  const agent = start(await joinToken(), "agent", undefined, { PALEBLUEDOT_CA_FINGERPRINT: "ab".repeat(32) });
  await waitFor(agent, "the refusal", () => agent.logTail().includes("ca-fingerprint-mismatch"));
  expect(await servers()).toHaveLength(0);
});

test("a certificate is renewed while running, and the session moves to it", async () => {
  await listeners.stop();
  await deps.close();
  deps = testDependencies(database.sql, { certificateHours: 0.01 });
  listeners = await startAgentListeners(deps, { allocations, presenceCheckMs: 200 });
  const agent = start(await joinToken());
  const row = await available(agent);
  const before = readFileSync(join(agent.dataDir, "identity", "certificate.pem"), "utf8");
  await waitFor(
    agent,
    "a new certificate",
    () => readFileSync(join(agent.dataDir, "identity", "certificate.pem"), "utf8") !== before,
  );
  await waitFor(agent, "a second session", async () => {
    const [epoch] = await database.sql<{ session_epoch: number }[]>`select session_epoch from servers`;
    return (epoch?.session_epoch ?? 0) >= 2;
  });
  await eventually(() => listeners.registry.isConnected(row.id) || undefined);
});

test("an agent whose certificate expired renews it by itself", async () => {
  const agent = start(await joinToken());
  const row = await available(agent);
  await agent.kill();
  // As after a month in the shelf: an expired certificate of the same key, and records that say so.
  await listeners.stop();
  await deps.close();
  const past = testDependencies(database.sql, {
    clock: { now: () => Date.now() - 30 * 86_400_000, sleep: () => Promise.resolve() },
  });
  const pastListeners = await startAgentListeners(past, { allocations });
  rmSync(join(agent.dataDir, "identity", "certificate.pem"));
  const token = await pastListeners.enrolment.createJoinToken({ name: "b", serverId: row.id }, operator);
  const again = startAgent({
    dataDir: agent.dataDir,
    controller: `127.0.0.1:${pastListeners.enrolmentPort}`,
    caFingerprint: pastListeners.caFingerprint,
    joinToken: token.token,
    env: { ...server.env, DOCKER_HOST: `unix://${join(dir, "no-engine.sock")}` },
  });
  await waitFor(again, "the old certificate", () => again.logTail().includes("enrolled"));
  await again.kill();
  await pastListeners.stop();
  await past.close();

  deps = testDependencies(database.sql);
  listeners = await startAgentListeners(deps, { allocations });
  const late = start(await joinToken());
  await waitFor(late, "a session", () => listeners.registry.isConnected(row.id));
  expect(await servers()).toHaveLength(1);
});

const faketime = spawnSync("faketime", ["--version"]).status === 0;
describe.skipIf(!faketime)("a wrong clock (needs faketime)", () => {
  test.each(["-10m", "+10m", "-20y"])(
    "%s: enrols, connects, and samples carry the controller's time",
    async (skew) => {
      const agent = start(await joinToken(), "agent", ["faketime", "-f", skew]);
      await available(agent);
      const uuid = server.gpus[0]?.uuid ?? "";
      const sample = await waitFor(agent, "telemetry", () => listeners.telemetry.latest(uuid));
      expect(Math.abs(sample.timeUnixMs - Date.now())).toBeLessThan(30_000);
    },
  );
});
