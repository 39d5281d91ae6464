import { afterAll, beforeAll, expect, test } from "vitest";
import type { Client } from "@grpc/grpc-js";
import {
  Condition_Status,
  GpuInventory,
  GpuSample,
  HostInventory,
  type Inventory,
} from "@palebluedot/shared/generated/palebluedot/agent/v1/agent.ts";
import { createTestFeature } from "../allocations/testing.ts";
import { retireServer } from "../servers/retire.ts";
import { createServerStates } from "../servers/state-machine.ts";
import { createTestDatabase, type TestDatabase } from "../db/testing.ts";
import { startAgentListeners, type AgentListeners } from "./listeners.ts";
import {
  agentClient,
  eventually,
  MemoryAllocations,
  testDependencies,
  TestPeer,
  TestSession,
  type EnrolledPeer,
} from "./testing.ts";

const operator = { name: "token:test" };
let database: TestDatabase;
let deps: ReturnType<typeof testDependencies>;
let allocations: MemoryAllocations;
let listeners: AgentListeners;
let peer: TestPeer;
let token: string;
const open: TestSession[] = [];

beforeAll(async () => {
  database = await createTestDatabase();
  deps = testDependencies(database.sql);
  allocations = new MemoryAllocations();
  listeners = await startAgentListeners(deps, {
    allocations,
    unreachableAfterMs: 300,
    presenceCheckMs: 100,
  });
  peer = new TestPeer(listeners);
  token = (
    await listeners.enrolment.createJoinToken({ name: "t", maxUses: 1000, autoApprove: true }, operator)
  ).token;
});

afterAll(async () => {
  for (const session of open) session.close();
  await listeners?.stop();
  await deps?.close();
  await database?.close();
});

let gpuCount = 0;
const firstChunk = (
  serverId: string,
  request: Parameters<AgentListeners["registry"]["openLogs"]>[1],
): Promise<unknown> => {
  const chunks = listeners.registry.openLogs(serverId, request, AbortSignal.timeout(20_000));
  return chunks[Symbol.asyncIterator]().next();
};
const newGpuUuid = (): string => `GPU-00000000-0000-0000-0000-${String((gpuCount += 1)).padStart(12, "0")}`;

function inventory(uuids: readonly string[], extra: Partial<Inventory> = {}): Inventory {
  return {
    host: { ...HostInventory.decode(new Uint8Array()), hostname: "h" },
    gpus: uuids.map((uuid, index) => ({
      ...GpuInventory.decode(new Uint8Array()),
      uuid,
      index,
      model: "NVIDIA L40S",
      pciBusId: `00000000:0${index}:00.0`,
      memoryTotalBytes: 48e9,
    })),
    conditions: [],
    ...extra,
  };
}

function session(
  joined: EnrolledPeer,
  hello: Parameters<typeof TestSession.prototype.hello>[0] = {},
): TestSession {
  const made = new TestSession(joined, hello);
  open.push(made);
  return made;
}

interface Row {
  state: string;
  conditions: Record<string, { status: string; reason: string }>;
  session_epoch: number;
}
async function row(serverId: string): Promise<Row> {
  const [found] = await database.sql<Row[]>`
    select state, conditions, session_epoch::float8 as session_epoch from servers where id = ${serverId}`;
  if (found === undefined) throw new Error("no such server");
  return found;
}
const events = (serverId: string, type: string): Promise<{ data: unknown; tenant_id: string | null }[]> =>
  database.sql<{ data: unknown; tenant_id: string | null }[]>`
    select data, tenant_id from outbox where server_id = ${serverId} and type = ${type}`;
const arrived = (serverId: string, type: string, n: number): Promise<boolean> =>
  eventually(async () => (await events(serverId, type)).length === n || undefined, `${n} ${type}`);

const sample = (gpuUuid: string, timeUnixMs = Date.now()): GpuSample => ({
  ...GpuSample.decode(new Uint8Array()),
  gpuUuid,
  timeUnixMs,
});

test("the first inventory makes a server available; an unchanged one writes nothing", async () => {
  const joined = await peer.join(token);
  const uuid = newGpuUuid();
  const first = session(joined);
  await first.answer("welcome");
  first.send({ $case: "inventory", value: inventory([uuid]) });
  await eventually(async () => (await row(joined.serverId)).state === "available" || undefined);
  const stamp = (): Promise<{ xmin: string }[]> =>
    database.sql<{ xmin: string }[]>`select xmin::text from gpus where uuid = ${uuid}`;
  const before = await stamp();
  first.send({ $case: "inventory", value: inventory([uuid]) });
  // Handled in order: when the events are acknowledged, the inventory before them was looked at.
  first.send({
    $case: "durableEvents",
    value: { journalId: "journal-1", events: [event(1)] },
  });
  await first.answer("eventAck");
  expect(await stamp()).toEqual(before);
  expect(allocations.capacityChanges).toContain(joined.serverId);
});

function event(sequence: number, more: Record<string, unknown> = {}) {
  return {
    sequence,
    timeUnixMs: Date.now(),
    type: "gpu.xid",
    gpuUuid: "",
    allocationId: "",
    message: `event ${sequence}`,
    dataJson: JSON.stringify({ xid: 79 }),
    ...more,
  };
}

test("durable events arrive once, whatever is sent again", async () => {
  const joined = await peer.join(token);
  const first = session(joined);
  await first.answer("welcome");
  first.send({
    $case: "durableEvents",
    value: { journalId: "journal-1", events: [event(1), event(2), event(3)] },
  });
  expect((await first.answer("eventAck")).lastSequence).toBe(3);
  // The acknowledgement was lost: everything is sent again over a new session, with more.
  first.close();
  const second = session(joined);
  expect((await second.answer("welcome")).lastEventSequence).toBe(3);
  second.send({
    $case: "durableEvents",
    value: { journalId: "journal-1", events: [event(2), event(3), event(4)] },
  });
  expect((await second.answer("eventAck")).lastSequence).toBe(4);
  await arrived(joined.serverId, "gpu.xid", 4);
});

test("an agent that names others' GPUs and allocations is not believed", async () => {
  const [victim, liar] = [await peer.join(token), await peer.join(token)];
  const uuid = newGpuUuid();
  const honest = session(victim);
  await honest.answer("welcome");
  honest.send({ $case: "inventory", value: inventory([uuid]) });
  await eventually(async () => (await row(victim.serverId)).state === "available" || undefined);
  honest.send({ $case: "telemetry", value: { gpuSamples: [sample(uuid, 1000)], hostSamples: [] } });
  await eventually(() => listeners.telemetry.latest(uuid));

  const lying = session(liar);
  await lying.answer("welcome");
  const tenant = "01900000-0000-7000-8000-0000000000aa";
  const allocation = "01900000-0000-7000-8000-0000000000bb";
  await database.sql`insert into tenants (id, name) values (${tenant}, 'acme')`;
  await database.sql`
    insert into allocations (id, tenant_id, state, request, lease_seconds, server_id)
    values (${allocation}, ${tenant}, 'active', '{}', 60, ${victim.serverId})`;
  lying.send({ $case: "inventory", value: inventory([uuid]) });
  lying.send({
    $case: "telemetry",
    value: { gpuSamples: [{ ...sample(uuid), temperatureCelsius: 99 }], hostSamples: [] },
  });
  lying.send({
    $case: "durableEvents",
    value: {
      journalId: "j",
      events: [
        event(1, { gpuUuid: uuid, allocationId: allocation }),
        event(2, { type: "allocation.active" }),
      ],
    },
  });
  await lying.answer("eventAck");
  await arrived(liar.serverId, "gpu.identity-conflict", 1);
  const [owner] = await database.sql<
    { server_id: string }[]
  >`select server_id from gpus where uuid = ${uuid}`;
  expect(owner?.server_id).toBe(victim.serverId);
  expect((await row(liar.serverId)).conditions["gpu-identity"]?.status).toBe("failed");
  expect(listeners.telemetry.latest(uuid)?.temperatureCelsius).toBeUndefined();
  expect((await events(liar.serverId, "gpu.xid")).map((one) => one.tenant_id)).toEqual([null]);
  expect(await events(liar.serverId, "allocation.active")).toEqual([]);
  expect(honest.ended).toBe(false);
});

const stack = (nvidiaSmi: Condition_Status, gpuDriver: Condition_Status): Inventory["conditions"] => [
  { component: "nvidia-smi", status: nvidiaSmi, reason: "r", message: "", sinceUnixMs: 1 },
  { component: "gpu-driver", status: gpuDriver, reason: "r", message: "", sinceUnixMs: 1 },
];

test("a GPU is missing when nvidia-smi says so, not when nvidia-smi says nothing", async () => {
  const joined = await peer.join(token);
  const uuid = newGpuUuid();
  const agent = session(joined);
  await agent.answer("welcome");
  const { OK, FAILED, UNKNOWN } = Condition_Status;
  agent.send({ $case: "inventory", value: inventory([uuid], { conditions: stack(OK, OK) }) });
  await eventually(async () => (await row(joined.serverId)).state === "available" || undefined);
  const statuses = async (): Promise<(string | undefined)[]> => {
    const { conditions } = await row(joined.serverId);
    return [conditions["nvidia-smi"]?.status, conditions["gpu-driver"]?.status];
  };
  for (const [smi, driver, words] of [
    [FAILED, UNKNOWN, ["failed", "unknown"]],
    [UNKNOWN, UNKNOWN, ["unknown", "unknown"]],
    [OK, FAILED, ["ok", "failed"]],
  ] as const) {
    agent.send({ $case: "inventory", value: inventory([], { conditions: stack(smi, driver) }) });
    await eventually(async () => String(await statuses()) === String(words) || undefined, String(words));
    expect(await database.sql`select present from gpus where uuid = ${uuid}`).toMatchObject([
      { present: true },
    ]);
  }
  expect(await events(joined.serverId, "gpu.missing")).toEqual([]);
  agent.send({ $case: "inventory", value: inventory([], { conditions: stack(OK, OK) }) });
  await arrived(joined.serverId, "gpu.missing", 1);
  expect(await database.sql`select present from gpus where uuid = ${uuid}`).toMatchObject([
    { present: false },
  ]);
});

test("a GPU moves when its old server is gone and nobody claims it", async () => {
  const [old, fresh] = [await peer.join(token), await peer.join(token)];
  const uuid = newGpuUuid();
  const first = session(old);
  await first.answer("welcome");
  first.send({ $case: "inventory", value: inventory([uuid]) });
  await eventually(async () => (await row(old.serverId)).state === "available" || undefined);
  first.close();
  await eventually(async () => "unreachable" in (await row(old.serverId)).conditions || undefined);
  const second = session(fresh);
  await second.answer("welcome");
  second.send({ $case: "inventory", value: inventory([uuid]) });
  await arrived(fresh.serverId, "gpu.moved", 1);
});

test("GPUs of a server that was given up come back with its host, but to nobody", async () => {
  const [old, fresh] = [await peer.join(token), await peer.join(token)];
  const uuid = newGpuUuid();
  const first = session(old);
  await first.answer("welcome");
  first.send({ $case: "inventory", value: inventory([uuid]) });
  await eventually(async () => (await row(old.serverId)).state === "available" || undefined);
  first.close();
  await eventually(async () => "unreachable" in (await row(old.serverId)).conditions || undefined);
  const { sql } = database;
  const [tenant] = await sql<{ id: string }[]>`
    insert into tenants (id, name) values (gen_random_uuid(), 'given-up') returning id`;
  const [allocation] = await sql<{ id: string }[]>`
    insert into allocations (id, tenant_id, state, request, lease_seconds, server_id)
    values (gen_random_uuid(), ${tenant?.id ?? ""}, 'active', '{}', 60, ${old.serverId}) returning id`;
  await sql`
    insert into claims (id, allocation_id, server_id, gpu_id, mode)
    select gen_random_uuid(), ${allocation?.id ?? ""}, server_id, id, 'whole' from gpus where uuid = ${uuid}`;
  const feature = createTestFeature(sql);
  const states = createServerStates(deps);
  const retired = await retireServer(
    { sql, states, allocations: feature.service },
    { id: old.serverId, reason: "lost", abandon: true, actor: operator },
  );
  await feature.close();
  expect(retired).toEqual({ retired: true, abandonedAllocations: 1 });

  const second = session(fresh);
  await second.answer("welcome");
  second.send({ $case: "inventory", value: inventory([uuid]) });
  await arrived(fresh.serverId, "gpu.moved", 1);
  expect(await sql`select server_id, present, schedulable from gpus where uuid = ${uuid}`).toEqual([
    { server_id: fresh.serverId, present: true, schedulable: false },
  ]);
  // The old certificate opens nothing.
  const ghost = session(old);
  await eventually(() => ghost.ended || undefined);
});

test("a server is unreachable after the grace, not before, and comes back; each is told once", async () => {
  const joined = await peer.join(token);
  const first = session(joined);
  await first.answer("welcome");
  first.send({ $case: "inventory", value: inventory([]) });
  await eventually(async () => (await row(joined.serverId)).state === "available" || undefined);
  first.close();
  const second = session(joined);
  await second.answer("welcome");
  expect(await events(joined.serverId, "server.disconnected")).toHaveLength(0);
  second.close();
  await eventually(async () => "unreachable" in (await row(joined.serverId)).conditions || undefined);
  await arrived(joined.serverId, "server.disconnected", 1);
  const third = session(joined);
  await third.answer("welcome");
  expect((await row(joined.serverId)).conditions).not.toHaveProperty("unreachable");
  await arrived(joined.serverId, "server.connected", 2);
});

test("a newer session fences the older one; a twin with another boot id is reported", async () => {
  const joined = await peer.join(token);
  const first = session(joined, { bootId: "boot-a" });
  const { sessionEpoch } = await first.answer("welcome");
  const second = session(joined, { bootId: "boot-b" });
  expect((await second.answer("welcome")).sessionEpoch).toBeGreaterThan(sessionEpoch);
  expect((await first.answer("goodbye")).reason).toBe(1);
  await arrived(joined.serverId, "server.duplicate-agent", 1);
  expect(listeners.registry.isConnected(joined.serverId)).toBe(true);
});

test("a session at another replica fences this one, and revocation there ends it here", async () => {
  const joined = await peer.join(token);
  const otherDeps = testDependencies(database.sql, { replicaId: "other-replica" });
  const other = await startAgentListeners(otherDeps, { allocations: new MemoryAllocations() });
  try {
    const here = session(joined);
    await here.answer("welcome");
    const there = session({ ...joined, agentPort: other.agentPort });
    await there.answer("welcome");
    expect((await here.answer("goodbye")).reason).toBe(1);
    await listeners.enrolment.revokeCertificates(joined.serverId, "test", operator);
    expect((await there.answer("goodbye")).reason).toBe(2);
  } finally {
    await other.stop();
    await otherDeps.close();
  }
});

test("revocations that nobody heard of are noticed, at whatever place the session is", async () => {
  const otherDeps = testDependencies(database.sql, { replicaId: "small-steps" });
  const other = await startAgentListeners(otherDeps, {
    allocations: new MemoryAllocations(),
    presenceCheckMs: 20,
    presenceComparedAtOnce: 2,
  });
  try {
    const joined: EnrolledPeer[] = [];
    for (let n = 0; n < 5; n += 1) joined.push(await peer.join(token));
    const sessions = joined.map((one) => session({ ...one, agentPort: other.agentPort }));
    for (const one of sessions) await one.answer("welcome");
    const revoked = [0, 2, 4];
    await database.sql`
      update certificates set revoked_at = now()
      where server_id = any(${revoked.map((n) => joined[n]?.serverId ?? "")}::uuid[])`;
    for (const n of revoked) expect((await sessions[n]?.answer("goodbye"))?.reason).toBe(2);
    await eventually(() => revoked.every((n) => sessions[n]?.ended) || undefined);
    expect(sessions.map((one) => one.ended)).toEqual([true, false, true, false, true]);
  } finally {
    await other.stop();
    await otherDeps.close();
  }
});

test("malformed protobuf ends its stream and no other", async () => {
  const [good, bad] = [await peer.join(token), await peer.join(token)];
  const steady = session(good);
  await steady.answer("welcome");
  const client = agentClient(bad) as unknown as Client;
  const stream = client.makeBidiStreamRequest(
    "/palebluedot.agent.v1.AgentService/Session",
    (bytes: Buffer) => bytes,
    (bytes) => bytes,
  );
  const ended = new Promise<Error>((resolve) => stream.on("error", resolve));
  // A length that points behind the end, and a wire type that does not exist.
  stream.write(Buffer.from("0aff07deadbeef", "hex"));
  expect(await ended).toBeInstanceOf(Error);
  client.close();
  steady.send({ $case: "durableEvents", value: { journalId: "journal-1", events: [event(1)] } });
  await steady.answer("eventAck");
});

test("millions of empty samples end their stream before they are decoded, and hold nobody up", async () => {
  const [good, bad] = [await peer.join(token), await peer.join(token)];
  const steady = session(good);
  await steady.answer("welcome");
  const client = agentClient(bad) as unknown as Client;
  const stream = client.makeBidiStreamRequest(
    "/palebluedot.agent.v1.AgentService/Session",
    (bytes: Buffer) => bytes,
    (bytes) => bytes,
  );
  const ended = new Promise<Error>((resolve) => stream.on("error", resolve));
  // Field 4, a length of three bytes, and 1,000,000 times "field 1, no bytes".
  const samples = Buffer.alloc(2_000_000, Buffer.from("0a00", "hex"));
  stream.write(Buffer.concat([Buffer.from("2280897a", "hex"), samples]));
  expect((await ended).message).toMatch(/deserializing/);
  client.close();
  steady.send({ $case: "durableEvents", value: { journalId: "journal-1", events: [event(1)] } });
  await steady.answer("eventAck");
});

test("an agent that fills every message ends its session", async () => {
  const joined = await peer.join(token);
  const one = session(joined);
  await one.answer("welcome");
  const value = { id: "x", ok: false, errorCode: "", errorMessage: "m".repeat(1_000_000) };
  for (let n = 0; n < 40; n += 1) one.send({ $case: "commandResult", value });
  expect((await one.answer("goodbye")).reason).toBe(5);
});

test("empty pieces of a log are held back like any other", async () => {
  const joined = await peer.join(token);
  const one = session(joined);
  await one.answer("welcome");
  const request = { allocationId: "a", follow: true, tailLines: 0, sinceUnixMs: 0, timestamps: false };
  const abort = new AbortController();
  const reader = listeners.registry.openLogs(joined.serverId, request, abort.signal)[Symbol.asyncIterator]();
  const first = reader.next();
  const command = await one.answer("command");
  const streamId = command.command?.$case === "openLogs" ? command.command.value.streamId : "";
  const upload = one.client.uploadLogs(() => undefined);
  upload.on("error", () => undefined);
  const empty = { stream: 1 as const, data: Buffer.alloc(0) };
  const full = { streamId: "", chunks: Array.from({ length: 10_000 }, () => empty) };
  let taken = 0;
  const push = (): void => {
    if (taken >= 200 || abort.signal.aborted) return;
    upload.write({ ...full, streamId }, () => {
      taken += 1;
      push();
    });
  };
  push();
  await first;
  let before = -1;
  await eventually(async () => {
    const settled = before === taken;
    before = taken;
    await new Promise((resolve) => setTimeout(resolve, 300));
    return settled || undefined;
  }, "the writer to stand still");
  expect(taken).toBeLessThan(200);
  abort.abort();
  await reader.return?.(undefined);
});

test.each([
  [
    "a batch of too many samples",
    (one: TestSession) => {
      one.hello({});
      const gpuSamples = Array.from({ length: 257 }, () => sample("GPU-none"));
      one.send({ $case: "telemetry", value: { gpuSamples, hostSamples: [] } });
    },
  ],
  [
    "no Hello first",
    (one: TestSession) =>
      one.send({
        $case: "observedState",
        value: { incarnation: "", generation: 0, workloads: [], conditions: [] },
      }),
  ],
  [
    "two GPUs of one UUID",
    (one: TestSession) => {
      one.hello({});
      one.send({ $case: "inventory", value: inventory(["GPU-same", "GPU-same"]) });
    },
  ],
  [
    "a component with control characters",
    (one: TestSession) => {
      one.hello({});
      one.send({
        $case: "inventory",
        value: inventory([], {
          conditions: [
            { component: "a\nb", status: Condition_Status.OK, reason: "", message: "", sinceUnixMs: 0 },
          ],
        }),
      });
    },
  ],
  [
    "a journal id with blanks",
    (one: TestSession) => {
      one.hello({});
      one.send({ $case: "durableEvents", value: { journalId: "a b", events: [event(1)] } });
    },
  ],
])("%s is a protocol error", async (_name, misbehave) => {
  const joined = await peer.join(token);
  const one = new TestSession(joined, null);
  open.push(one);
  misbehave(one);
  expect((await one.answer("goodbye")).reason).toBe(4);
  await eventually(() => one.ended || undefined);
});

test("control characters from nvidia-smi reach no row", async () => {
  const joined = await peer.join(token);
  const one = session(joined);
  await one.answer("welcome");
  const uuid = newGpuUuid();
  const dirty = inventory([uuid]);
  if (dirty.gpus[0] !== undefined) dirty.gpus[0].model = "NVIDIA\u0000 \u001b[31mL40S\u202e";
  one.send({ $case: "inventory", value: dirty });
  const [gpu] = await eventually(async () => {
    const rows = await database.sql<{ model: string }[]>`select model from gpus where uuid = ${uuid}`;
    return rows.length > 0 ? rows : undefined;
  });
  expect(gpu?.model).not.toMatch(/[\p{Cc}\p{Cf}]/u);
});

test("a changed desired state is pushed once, however often it is announced", async () => {
  const joined = await peer.join(token);
  const one = session(joined);
  await one.answer("welcome");
  const document = { incarnation: "i", generation: 7, drain: false, workloads: [] };
  allocations.desired.set(joined.serverId, document);
  for (let time = 0; time < 20; time += 1) listeners.registry.desiredStateChanged([joined.serverId]);
  await deps.notifications.notify("desired_state", joined.serverId);
  expect((await one.answer("desiredState")).generation).toBe(7);
  allocations.desired.set(joined.serverId, { ...document, generation: 8 });
  listeners.registry.desiredStateChanged([joined.serverId]);
  expect((await one.answer("desiredState", 1)).generation).toBe(8);
});

test("logs flow from the agent's own stream, refusals reach the reader, and a reader that leaves cancels", async () => {
  const joined = await peer.join(token);
  const one = session(joined);
  await one.answer("welcome");
  const request = { allocationId: "a", follow: true, tailLines: 0, sinceUnixMs: 0, timestamps: false };
  const abort = new AbortController();
  const reading = (async () => {
    const texts: string[] = [];
    for await (const chunk of listeners.registry.openLogs(joined.serverId, request, abort.signal)) {
      texts.push(Buffer.from(chunk.data).toString());
      if (texts.length === 2) break;
    }
    return texts;
  })();
  const command = await one.answer("command");
  const streamId = command.command?.$case === "openLogs" ? command.command.value.streamId : "";
  let cancelled = false;
  const upload = one.client.uploadLogs(() => {
    cancelled = true;
  });
  upload.on("error", () => undefined);
  upload.write({ streamId, chunks: [{ stream: 1, data: Buffer.from("one") }] });
  upload.write({ streamId: "", chunks: [{ stream: 1, data: Buffer.from("two") }] });
  expect(await reading).toEqual(["one", "two"]);
  await eventually(() => cancelled || undefined, "the cancellation");

  const refused = firstChunk(joined.serverId, request);
  const second = await one.answer("command", 1);
  one.send({
    $case: "commandResult",
    value: { id: second.id, ok: false, errorCode: "workload-not-found", errorMessage: "gone" },
  });
  await expect(refused).rejects.toMatchObject({ code: "workload-not-found" });
  const nowhere = firstChunk("01900000-0000-7000-8000-0000000000ff", request);
  await expect(nowhere).rejects.toMatchObject({ code: "agent-not-connected" });
});

test("a wrong clock of the host does not reach the samples", async () => {
  const joined = await peer.join(token);
  const skew = 10 * 60_000;
  const one = session(joined, { agentTimeUnixMs: Date.now() - skew });
  await one.answer("welcome");
  const uuid = newGpuUuid();
  one.send({ $case: "inventory", value: inventory([uuid]) });
  await eventually(async () => (await row(joined.serverId)).state === "available" || undefined);
  one.send({ $case: "telemetry", value: { gpuSamples: [sample(uuid, Date.now() - skew)], hostSamples: [] } });
  const latest = await eventually(() => listeners.telemetry.latest(uuid));
  expect(Math.abs(latest.timeUnixMs - Date.now())).toBeLessThan(5000);
});
