import { systemClock } from "@palebluedot/shared/clock.ts";
import {
  Condition_Status,
  DurableEvent,
  GpuInventory,
  GpuSample,
  Goodbye_Reason,
  HostInventory,
  type Inventory,
} from "@palebluedot/shared/generated/palebluedot/agent/v1/agent.ts";
import { afterAll, beforeAll, expect, test } from "vitest";
import { createTestDatabase, type TestDatabase } from "../db/testing.ts";
import { cleanInventory, maxGpusPerServer } from "../servers/clean-inventory.ts";
import { ingestInventory, maxGpuRowsPerServer } from "../servers/ingest-inventory.ts";
import { createServerStates } from "../servers/state-machine.ts";
import { addressOf, startAgentListeners, type AgentListeners } from "./listeners.ts";
import {
  eventually,
  MemoryAllocations,
  TestPeer,
  testDependencies,
  TestSession,
  type EnrolledPeer,
} from "./testing.ts";

// Here nothing but the message at hand ends a session: presence looks at the database only at its start.
let aheadMs = 0;
let database: TestDatabase;
let deps: ReturnType<typeof testDependencies>;
let allocations: MemoryAllocations;
let listeners: AgentListeners;
let peer: TestPeer;
let token: string;
const open: TestSession[] = [];

beforeAll(async () => {
  database = await createTestDatabase();
  deps = testDependencies(database.sql, { clock: { ...systemClock, now: () => Date.now() + aheadMs } });
  allocations = new MemoryAllocations();
  listeners = await startAgentListeners(deps, {
    allocations,
    presenceCheckMs: 600_000,
    telemetrySweepMs: 50,
  });
  peer = new TestPeer(listeners);
  const made = await listeners.enrolment.createJoinToken(
    { name: "t", maxUses: 100, autoApprove: true },
    { name: "token:test" },
  );
  token = made.token;
});

afterAll(async () => {
  for (const session of open) session.close();
  await listeners?.stop();
  await deps?.close();
  await database?.close();
});

function session(joined: EnrolledPeer): TestSession {
  const made = new TestSession(joined);
  open.push(made);
  return made;
}

let gpuCount = 0;
const newGpuUuid = (): string => `GPU-${String((gpuCount += 1)).padStart(12, "0")}`;
const newGpuUuids = (count: number): string[] => Array.from({ length: count }, newGpuUuid);

function inventory(uuids: readonly string[], conditions: Inventory["conditions"] = []): Inventory {
  return {
    host: { ...HostInventory.decode(new Uint8Array()), hostname: "h" },
    gpus: uuids.map((uuid, index) => ({
      ...GpuInventory.decode(new Uint8Array()),
      uuid,
      index,
      model: "NVIDIA L40S",
      pciBusId: `00000000:${index.toString(16).padStart(2, "0")}:00.0`,
    })),
    conditions,
  };
}

const sample = (gpuUuid: string): GpuSample => ({
  ...GpuSample.decode(new Uint8Array()),
  gpuUuid,
  timeUnixMs: Date.now(),
});

interface Row {
  epoch: number;
  state: string;
  inventory: unknown;
  replica: string | null;
}
async function row(serverId: string): Promise<Row> {
  const [found] = await database.sql<Row[]>`
    select session_epoch::float8 as epoch, state, inventory, session_replica as replica
    from servers where id = ${serverId}`;
  if (found === undefined) throw new Error("no such server");
  return found;
}

/** A newer session somewhere else, of which this replica was not told. */
async function fenceSilently(serverId: string): Promise<void> {
  await database.sql`update servers set session_epoch = session_epoch + 1 where id = ${serverId}`;
}

const ownedBy = async (serverId: string): Promise<{ uuid: string; present: boolean }[]> =>
  await database.sql<
    { uuid: string; present: boolean }[]
  >`select uuid, present from gpus where server_id = ${serverId} order by uuid`;

async function ready(joined: EnrolledPeer, uuids: readonly string[]): Promise<TestSession> {
  const agent = session(joined);
  await agent.answer("welcome");
  agent.send({ $case: "inventory", value: inventory(uuids) });
  await eventually(async () => (await row(joined.serverId)).state === "available" || undefined);
  return agent;
}

test("where a session comes from is what the listener sees", async () => {
  const joined = await peer.join(token);
  await session(joined).answer("welcome");
  const [stored] = await database.sql<{ address: string }[]>`
    select session_address as address from servers where id = ${joined.serverId}`;
  expect(stored?.address).toBe("127.0.0.1");
});

test.each([
  ["10.0.0.5:4711", "10.0.0.5"],
  ["::ffff:10.0.0.5:4711", "10.0.0.5"],
  ["2001:db8::5:4711", "2001:db8::5"],
  ["[2001:db8::5]:4711", "2001:db8::5"],
  ["fe80::1%eth0:4711", null],
  ["unknown", null],
])("the socket's %s is the address %s", (remote, address) => {
  expect(addressOf(remote)).toBe(address);
});

test("a revoked certificate opens no session, not even for a moment", async () => {
  const joined = await peer.join(token);
  await database.sql`update certificates set revoked_at = now() where server_id = ${joined.serverId}`;
  const agent = session(joined);
  expect((await agent.answer("goodbye")).reason).toBe(Goodbye_Reason.REVOKED);
  await eventually(() => agent.ended || undefined);
  expect(agent.received.map((one) => one.message?.$case)).toEqual(["goodbye"]);
  expect(await row(joined.serverId)).toMatchObject({ epoch: 0, replica: null });
});

test("what a session says carries its epoch", async () => {
  const joined = await peer.join(token);
  const agent = session(joined);
  const { sessionEpoch } = await agent.answer("welcome");
  agent.send({
    $case: "observedState",
    value: { incarnation: "i", generation: 0, workloads: [], conditions: [] },
  });
  const heard = await eventually(() => allocations.observed.find((one) => one.serverId === joined.serverId));
  expect(heard.epoch).toBe(sessionEpoch);
  expect(sessionEpoch).toBeGreaterThan(0);
});

test("a fenced session's inventory is not written", async () => {
  const joined = await peer.join(token);
  const agent = session(joined);
  await agent.answer("welcome");
  await fenceSilently(joined.serverId);
  agent.send({ $case: "inventory", value: inventory([newGpuUuid()]) });
  expect((await agent.answer("goodbye")).reason).toBe(Goodbye_Reason.FENCED);
  expect(await row(joined.serverId)).toMatchObject({ state: "verifying", inventory: null });
  expect(await ownedBy(joined.serverId)).toEqual([]);
});

test("a fenced session's events are neither stored nor acknowledged: the newer one is sent them", async () => {
  const joined = await peer.join(token);
  const batch = {
    journalId: "journal-1",
    events: [{ ...DurableEvent.decode(new Uint8Array()), sequence: 1, type: "gpu.xid", dataJson: "{}" }],
  };
  const stored = async (): Promise<number> =>
    (await database.sql`select 1 from outbox where server_id = ${joined.serverId} and type = 'gpu.xid'`)
      .length;
  const agent = session(joined);
  await agent.answer("welcome");
  await fenceSilently(joined.serverId);
  agent.send({ $case: "durableEvents", value: batch });
  expect((await agent.answer("goodbye")).reason).toBe(Goodbye_Reason.FENCED);
  expect(agent.received.some((one) => one.message?.$case === "eventAck")).toBe(false);
  expect(await stored()).toBe(0);
  const next = session(joined);
  expect((await next.answer("welcome")).lastEventSequence).toBe(0);
  next.send({ $case: "durableEvents", value: batch });
  expect((await next.answer("eventAck")).lastSequence).toBe(1);
  expect(await stored()).toBe(1);
});

test("a GPU that a tenant holds is not taken over by another server, though its own is away", async () => {
  const [old, other] = [await peer.join(token), await peer.join(token)];
  const uuid = newGpuUuid();
  const first = await ready(old, [uuid]);
  const { sql } = database;
  const [tenant] = await sql<{ id: string }[]>`
    insert into tenants (id, name) values (gen_random_uuid(), 'holder') returning id`;
  const [allocation] = await sql<{ id: string }[]>`
    insert into allocations (id, tenant_id, state, request, lease_seconds, server_id)
    values (gen_random_uuid(), ${tenant?.id ?? ""}, 'active', '{}', 60, ${old.serverId}) returning id`;
  await sql`
    insert into claims (id, allocation_id, server_id, gpu_id, mode)
    select gen_random_uuid(), ${allocation?.id ?? ""}, server_id, id, 'whole' from gpus where uuid = ${uuid}`;
  first.close();
  await eventually(async () => (await row(old.serverId)).replica === null || undefined);

  const second = await ready(other, [uuid]);
  expect(await ownedBy(old.serverId)).toEqual([{ uuid, present: true }]);
  expect(await ownedBy(other.serverId)).toEqual([]);
  const told =
    await sql`select 1 from outbox where server_id = ${other.serverId} and type = 'gpu.identity-conflict'`;
  expect(told).toHaveLength(1);
  // Once nobody holds it, it moves: it was the claim that kept it.
  await sql`update claims set usage_ended_at = now(), released_at = now() where allocation_id = ${allocation?.id ?? ""}`;
  second.send({ $case: "inventory", value: { ...inventory([uuid]), host: undefined } });
  await eventually(async () => (await ownedBy(other.serverId)).length === 1 || undefined);
});

test("telemetry of a GPU that is no longer reported is forgotten, and of one whose server went", async () => {
  const joined = await peer.join(token);
  const [stays, goes] = [newGpuUuid(), newGpuUuid()];
  const agent = await ready(joined, [stays, goes]);
  agent.send({
    $case: "telemetry",
    value: { gpuSamples: [sample(stays), sample(goes)], hostSamples: [] },
  });
  await eventually(() => listeners.telemetry.latest(goes));
  agent.send({ $case: "inventory", value: inventory([stays]) });
  await eventually(() => listeners.telemetry.latest(goes) === undefined || undefined);
  expect(listeners.telemetry.latest(stays)).toBeDefined();

  agent.close();
  aheadMs = 3_700_000;
  try {
    await eventually(() => listeners.telemetry.latest(stays) === undefined || undefined);
  } finally {
    aheadMs = 0;
  }
});

test("an agent that reports other GPUs every time fills no table", async () => {
  const { serverId } = await peer.join(token);
  const ingest = async (
    uuids: readonly string[],
    conditions: Inventory["conditions"] = [],
  ): Promise<unknown> =>
    await ingestInventory(
      { sql: database.sql, log: deps.log, states: createServerStates(deps) },
      { serverId, epoch: 0 },
      cleanInventory(inventory(uuids, conditions)),
    );
  const [closed, ...others] = newGpuUuids(maxGpusPerServer);
  if (closed === undefined) throw new Error("no GPU");
  await ingest([closed, ...others]);
  await database.sql`update gpus set schedulable = false where uuid = ${closed}`;
  let last: string[] = [];
  for (let time = 0; time < 6; time += 1) {
    last = newGpuUuids(maxGpusPerServer);
    await ingest(last);
  }
  const kept = await ownedBy(serverId);
  expect(kept).toHaveLength(maxGpuRowsPerServer);
  expect(kept.filter((gpu) => gpu.present).map((gpu) => gpu.uuid)).toEqual(last);
  // What an operator closed stays closed.
  expect(kept.map((gpu) => gpu.uuid)).toContain(closed);

  // An agent that cannot see what is gone makes none of it go: then the new ones have no place.
  const blind = {
    component: "nvidia-smi",
    status: Condition_Status.FAILED,
    reason: "r",
    message: "",
    sinceUnixMs: 1,
  };
  for (let time = 0; time < 3; time += 1)
    await ingest(newGpuUuids(maxGpusPerServer - 1), [blind]).catch(() => 0);
  await expect(ingest(newGpuUuids(maxGpusPerServer), [blind])).rejects.toMatchObject({
    code: "too-many-gpus",
  });
  expect((await ownedBy(serverId)).length).toBeLessThanOrEqual(maxGpuRowsPerServer);
  expect(() => cleanInventory(inventory(newGpuUuids(maxGpusPerServer + 1)))).toThrowError(/gpus/);
});
