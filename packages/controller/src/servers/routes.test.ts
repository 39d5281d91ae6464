import { uuidv7 } from "uuidv7";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { createTestApi, type TestApi } from "../http/testing.ts";
import { prometheusTargets } from "./prometheus-targets.ts";
import { conditionsOf, snakeCased } from "./view.ts";

let api: TestApi;
beforeAll(async () => {
  api = await createTestApi();
});
afterAll(() => api.close());

const names = (answer: { json: { items: { name: string }[] } }): string[] =>
  answer.json.items.map((item) => item.name);

const nic = (name: string, addresses: string[]) => ({ name, addresses, operationalState: "up" });

async function withInventory(
  name: string,
  host: unknown,
  sessionAddress: string | null,
  labels: Record<string, string> = {},
): Promise<void> {
  const { id } = await api.makeServer(name);
  await api.deps.sql`
    update servers set inventory = ${api.deps.sql.json({ host } as never)}, session_address = ${sessionAddress}, labels = ${api.deps.sql.json(labels)}
    where id = ${id}`;
}

describe("registering a server", () => {
  test("normalises what identifies it, and waits as pending", async () => {
    const answer = await api.call("POST", "/api/v1/servers", {
      json: {
        name: "rack1-07",
        serial: "  abc123 ",
        smbios_uuid: "4C4C4544-0042-3510-8052-B4C04F423132",
        macs: ["AA-BB-CC-00-11-22"],
        labels: { tier: "gold" },
        rack: "r1",
        rack_unit: 7,
      },
    });
    expect(answer.status).toBe(201);
    expect(answer.json).toMatchObject({
      state: "pending",
      smbios_uuid: "4c4c4544-0042-3510-8052-b4c04f423132",
      macs: ["aa:bb:cc:00:11:22"],
      connected: false,
      inventory: null,
      rack_unit: 7,
    });
    const again = await api.call("POST", "/api/v1/servers", { json: { name: "rack1-07" } });
    expect(again).toMatchObject({ status: 409, json: { code: "server-name-taken" } });
  });

  test.each([
    ["a placeholder serial", { serial: "To be filled by O.E.M." }, "/serial"],
    ["an all-F UUID", { smbios_uuid: "ffffffff-ffff-ffff-ffff-ffffffffffff" }, "/smbios_uuid"],
    ["a MAC that is none", { macs: ["nonsense"] }, "/macs/0"],
    ["a name with a line break", { name: "a\nb" }, "/name"],
    ["a state of one's own", { state: "available" }, "/state"],
  ])("refuses %s", async (_name, json, pointer) => {
    const answer = await api.call("POST", "/api/v1/servers", { json: { name: "bad", ...json } });
    expect(answer.status).toBe(422);
    expect(answer.json.errors.map((fault: { pointer: string }) => fault.pointer)).toContain(pointer);
  });
});

describe("listing servers", () => {
  beforeAll(async () => {
    const one = await api.makeServer("list-h100", { gpus: 2 });
    await api.makeServer("list-t4", { gpus: 1, model: "Tesla T4" });
    await api.makeServer("list-100%", { state: "maintenance" });
    await api.call("PATCH", `/api/v1/servers/${one.id}`, { json: { labels: { zone: "a", gold: "" } } });
  });

  test.each([
    ["by name", "q=list-", ["list-h100", "list-t4", "list-100%"]],
    ["a wildcard of SQL is itself", "q=100%25", ["list-100%"]],
    ["by state", "q=list&state=maintenance", ["list-100%"]],
    ["by GPU model", "q=list&model=t4", ["list-t4"]],
    ["by label", "label=zone=a", ["list-h100"]],
    ["by two labels, one by key", "label=zone=a&label=gold", ["list-h100"]],
    ["by a label nobody has", "label=zone=b", []],
  ])("%s", async (_name, query, expected) => {
    expect(names(await api.call("GET", `/api/v1/servers?${query}`))).toEqual(expected);
  });

  test("counts GPUs and what is claimed of them", async () => {
    const list = await api.call("GET", "/api/v1/servers?q=list-h100");
    expect(list.json.items[0]).toMatchObject({
      gpu_count: 2,
      gpu_claimed_count: 0,
      gpu_models: ["NVIDIA H100 80GB HBM3"],
      connected: true,
    });
  });

  test("a cursor goes on after the page, also when the last one is deleted", async () => {
    const first = await api.call("GET", "/api/v1/servers?limit=1&q=list-");
    const second = await api.call("GET", `/api/v1/servers?limit=10&q=list-&cursor=${first.json.next_cursor}`);
    expect(second).toMatchObject({ status: 200, json: { next_cursor: null } });
    expect([...names(first), ...names(second)]).toEqual(["list-h100", "list-t4", "list-100%"]);
  });
});

describe("changing a server", () => {
  test("draining starts a new generation, sets a condition and is announced", async () => {
    const { id } = await api.makeServer("drained");
    const path = `/api/v1/servers/${id}`;
    const on = await api.call("PATCH", path, { json: { draining: true } });
    expect(on.json).toMatchObject({ draining: true, desired_generation: 1 });
    expect(on.json.conditions).toMatchObject([{ name: "draining", reason: "draining" }]);
    expect(api.fleetChanges).toContain(id);
    const same = await api.call("PATCH", path, { json: { draining: true } });
    expect(same.json.desired_generation).toBe(1);
    const off = await api.call("PATCH", path, { json: { draining: false } });
    expect(off.json).toMatchObject({ draining: false, desired_generation: 2, conditions: [] });
  });

  test("null clears a place; a taken name is refused; nothing to change is refused", async () => {
    const { id } = await api.makeServer("changed");
    const path = `/api/v1/servers/${id}`;
    await api.call("PATCH", path, { json: { site: "ams1", rack: "r2" } });
    const cleared = await api.call("PATCH", path, { json: { site: null } });
    expect(cleared.json).toMatchObject({ site: null, rack: "r2" });
    await api.makeServer("taken");
    const taken = await api.call("PATCH", path, { json: { name: "taken" } });
    expect(taken).toMatchObject({ status: 409, json: { code: "server-name-taken" } });
    expect((await api.call("PATCH", path, { json: {} })).status).toBe(422);
  });
});

describe("retiring a server", () => {
  test("is refused while an allocation is on it, and takes it out of lists after", async () => {
    const server = await api.makeServer("retired", { gpus: 1 });
    const tenant = await api.makeTenant("retiring");
    const allocation = await api.call("POST", "/api/v1/allocations", {
      token: tenant.token,
      json: { gpus: { count: 1 }, container: { image: "a" } },
    });
    await api.deps.sql`
      insert into claims (id, allocation_id, server_id, gpu_id, mode)
      values (${uuidv7()}, ${allocation.json.id}, ${server.id}, ${server.gpus[0]?.id ?? ""}, 'whole')`;
    const path = `/api/v1/servers/${server.id}/retire`;
    const refused = await api.call("POST", path);
    expect(refused).toMatchObject({ status: 409, json: { code: "server-not-retirable" } });
    const gpus = await api.call("GET", `/api/v1/gpus?server_id=${server.id}&state=claimed`);
    expect(gpus.json.items[0].claims[0]).toMatchObject({
      allocation_id: allocation.json.id,
      tenant_id: tenant.id,
      mode: "whole",
    });
    await api.deps.sql`update claims set usage_ended_at = now(), released_at = now()`;
    expect(await api.call("POST", path)).toMatchObject({ status: 200, json: { state: "retired" } });
    expect(await api.call("POST", path)).toMatchObject({ status: 200, json: { state: "retired" } });
    expect(names(await api.call("GET", "/api/v1/servers?q=retired"))).toEqual([]);
    expect(names(await api.call("GET", "/api/v1/servers?q=retired&state=retired"))).toEqual(["retired"]);
  });
});

/** A server with one active and one releasing allocation, whose agent went away. */
async function dead(
  name: string,
): Promise<{ id: string; gpus: string[]; allocations: string[]; token: string }> {
  const { sql } = api.deps;
  const server = await api.makeServer(name, { gpus: 2 });
  const tenant = await api.makeTenant(name);
  const allocations: string[] = [];
  for (const [index, state] of (["active", "releasing"] as const).entries()) {
    const made = await api.call("POST", "/api/v1/allocations", {
      token: tenant.token,
      json: { gpus: { count: 1 }, container: { image: "a" } },
    });
    const id = made.json.id as string;
    allocations.push(id);
    await sql`
      update allocations set state = ${state}, server_id = ${server.id},
        end_reason = ${state === "releasing" ? "released" : null} where id = ${id}`;
    await sql`
      insert into claims (id, allocation_id, server_id, gpu_id, mode)
      values (${uuidv7()}, ${id}, ${server.id}, ${server.gpus[index]?.id ?? ""}, 'whole')`;
  }
  await sql`
    insert into certificates (serial, server_id, public_key_sha256, not_before, not_after)
    values (${`5e${uuidv7().replaceAll("-", "")}`}, ${server.id}, ${Buffer.alloc(32, 1)}, now(), now() + interval '1 day')`;
  return { id: server.id, gpus: server.gpus.map((gpu) => gpu.id), allocations, token: tenant.token };
}
const goesAway = (id: string) => api.deps.sql`
  update servers set session_replica = null, disconnected_at = now() - interval '1 hour',
    conditions = conditions || '{"unreachable": {"status": "failed", "reason": "agent-disconnected", "message": "", "since": "2026-01-01T00:00:00Z"}}'
  where id = ${id}`;

describe("a dead server with allocations on it", () => {
  const abandoned = { abandon_allocations: true, reason: "burnt out" };

  test("is retired with them, in one step, and its GPUs are held back", async () => {
    const { sql } = api.deps;
    const server = await dead("burnt");
    await goesAway(server.id);
    const path = `/api/v1/servers/${server.id}/retire`;
    const refused = await api.call("POST", path);
    expect(refused).toMatchObject({ status: 409, json: { code: "server-not-retirable" } });
    expect(refused.json.hint).toContain("--abandon");
    expect((await api.call("POST", path, { json: { abandon_allocations: true } })).status).toBe(422);

    const answer = await api.call("POST", path, { json: abandoned });
    expect(answer).toMatchObject({ status: 200, json: { state: "retired", state_message: "burnt out" } });
    const shown = await Promise.all(
      server.allocations.map(
        async (id) => (await api.call("GET", `/api/v1/allocations/${id}`, { token: server.token })).json,
      ),
    );
    expect(shown).toMatchObject([
      { state: "ended", end_reason: "failed", message: expect.stringContaining("burnt out") as string },
      { state: "ended", end_reason: "released" },
    ]);
    expect(await sql`select from claims where server_id = ${server.id} and released_at is null`).toHaveLength(
      0,
    );
    expect(
      await sql`select from certificates where server_id = ${server.id} and revoked_at is null`,
    ).toHaveLength(0);
    expect(
      await sql`select present, schedulable, health from gpus where server_id = ${server.id} order by index`,
    ).toEqual(server.gpus.map(() => ({ present: false, schedulable: false, health: "unknown" })));
    const types = await sql<{ type: string }[]>`
      select type from outbox where allocation_id = ${server.allocations[0] ?? ""}
      union all select type from events where allocation_id = ${server.allocations[0] ?? ""}`;
    expect(types.map(({ type }) => type)).toEqual(
      expect.arrayContaining(["allocation.releasing", "allocation.ended"]),
    );
    expect(api.fleetChanges).toContain(server.id);
    expect((await api.call("POST", path, { json: abandoned })).status).toBe(200);
  });

  test("is not given up while its agent is there, and nothing of it happens", async () => {
    const { sql } = api.deps;
    const server = await dead("alive");
    const path = `/api/v1/servers/${server.id}/retire`;
    for (const step of [
      () => Promise.resolve(),
      // Gone for a moment is not unreachable.
      () => sql`update servers set session_replica = null where id = ${server.id}`,
    ]) {
      await step();
      const answer = await api.call("POST", path, { json: abandoned });
      expect(answer).toMatchObject({ status: 409, json: { code: "server-not-retirable" } });
    }
    await goesAway(server.id);
    await sql`update servers set state = 'in_use' where id = ${server.id}`;
    expect((await api.call("POST", path, { json: abandoned })).json).toMatchObject({
      code: "server-not-retirable",
    });
    expect(await sql`select state from allocations where server_id = ${server.id} order by id`).toEqual([
      { state: "active" },
      { state: "releasing" },
    ]);
    expect(await sql`select from claims where server_id = ${server.id} and released_at is null`).toHaveLength(
      2,
    );
    expect(await sql`select from gpus where server_id = ${server.id} and schedulable`).toHaveLength(2);
  });
});

describe("enrolment through REST", () => {
  test("a join token's secret is shown once", async () => {
    const made = await api.call("POST", "/api/v1/join-tokens", { json: { name: "rack 1", max_uses: 8 } });
    expect(made.status).toBe(201);
    expect(made.json.token).toMatch(/^pbj_/);
    expect(made.json.ca_fingerprint).toMatch(/^[0-9a-f]{64}$/);
    const list = await api.call("GET", "/api/v1/join-tokens");
    expect(list.json.items).toMatchObject([{ name: "rack 1", max_uses: 8, uses: 0, revoked_at: null }]);
    expect(JSON.stringify(list.json)).not.toContain("pbj_");
    const revoked = await api.call("DELETE", `/api/v1/join-tokens/${made.json.id}`);
    expect(revoked.json.revoked_at).not.toBeNull();
    const again = await api.call("DELETE", `/api/v1/join-tokens/${made.json.id}`);
    expect(again.json.revoked_at).toBe(revoked.json.revoked_at);
  });

  test("nothing to approve is said in words", async () => {
    const { id } = await api.makeServer("unasked", { state: "pending" });
    for (const verb of ["approve", "reject"]) {
      const answer = await api.call("POST", `/api/v1/servers/${id}/${verb}`);
      expect(answer, verb).toMatchObject({ status: 409, json: { code: "enrolment-not-pending" } });
    }
    const revoked = await api.call("POST", `/api/v1/servers/${id}/revoke-certificates`);
    expect(revoked.json).toEqual({ server_id: id, revoked_count: 0 });
  });
});

describe("service discovery for Prometheus", () => {
  test("names the address that each agent's session comes from, not what the agent says, with scheme and place", async () => {
    await withInventory(
      "p-plain",
      {
        metricsPort: 9835,
        hostname: "metadata.internal",
        networkInterfaces: [nic("eth0", ["169.254.169.254/16"])],
      },
      "10.0.0.5",
    );
    await withInventory("p-six", { metricsPort: 9835, metricsTls: true }, "2001:db8::5");
    await withInventory(
      "p-never",
      { metricsPort: 9835, hostname: "database.internal", networkInterfaces: [] },
      null,
    );
    await withInventory("p-nat", { metricsPort: 9835, hostname: "inner" }, "192.0.2.1", {
      "metrics-address": "gw.example:1234",
    });
    await withInventory("p-none", { hostname: "silent", networkInterfaces: [] }, "10.0.0.6");
    const groups = await prometheusTargets(api.deps.sql);
    const of = (name: string) => groups.find((group) => group.labels["server"] === name);
    expect(of("p-plain")?.targets).toEqual(["10.0.0.5:9835"]);
    expect(of("p-plain")?.labels["__scheme__"]).toBe("http");
    expect(of("p-six")).toMatchObject({ targets: ["[2001:db8::5]:9835"], labels: { __scheme__: "https" } });
    expect(of("p-never")).toBeUndefined();
    expect(of("p-nat")).toMatchObject({
      targets: ["gw.example:1234"],
      labels: { __meta_palebluedot_label_metrics_address: "gw.example:1234" },
    });
    expect(of("p-none")).toBeUndefined();
    const served = await api.call("GET", "/api/v1/prometheus/targets");
    expect(served.json).toEqual(groups);
  });
});

describe("views", () => {
  test("names of the agent link become the API's", () => {
    expect(
      snakeCased({ memoryTotalBytes: 1, pciBusId: "x", nested: [{ load1m: 2, cpuModel: null }] }),
    ).toEqual({
      memory_total_bytes: 1,
      pci_bus_id: "x",
      nested: [{ load_1m: 2, cpu_model: null }],
    });
  });

  test("a condition that is stored oddly is shown as unknown, not hidden", () => {
    expect(
      conditionsOf({
        b: "odd",
        a: { status: "failed", since: "1970-01-01T00:00:00.000Z" },
        c: { status: "ok", since: "2026-01-02T00:00:00Z" },
      }),
    ).toEqual([
      { name: "a", status: "failed", reason: "", message: "", since: null },
      { name: "b", status: "unknown", reason: "", message: "", since: null },
      { name: "c", status: "ok", reason: "", message: "", since: "2026-01-02T00:00:00.000Z" },
    ]);
  });
});
