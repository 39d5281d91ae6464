import type { LogChunk } from "@palebluedot/shared/generated/palebluedot/agent/v1/agent.ts";
import { PlatformError } from "@palebluedot/shared/errors.ts";
import { uuidv7 } from "uuidv7";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { createTestApi, type TestApi } from "../http/testing.ts";

let api: TestApi;
let acme: { id: string; token: string };
let globex: { id: string; token: string };
let operator = "";

beforeAll(async () => {
  api = await createTestApi();
  acme = await api.makeTenant("acme");
  globex = await api.makeTenant("globex");
  operator = await api.makeStaff("operator");
});
afterAll(() => api.close());

const request = { gpus: { count: 1, model: "H100" }, container: { image: "registry.example/app:1" } };

const create = (token: string, json: unknown = request, headers: Record<string, string> = {}) =>
  api.call("POST", "/api/v1/allocations", { token, json, headers });

test("a tenant does not go before others; an operator may let it", async () => {
  const urgent = { ...request, priority: 1 };
  const refused = await create(acme.token, urgent);
  expect(refused.status).toBe(403);
  expect(refused.json).toMatchObject({ code: "priority-not-allowed" });
  expect((await create(acme.token, { ...request, priority: 0 })).status).toBe(202);
  const made = await create(operator, { ...urgent, priority: 100, tenant_id: acme.id });
  expect(made.json).toMatchObject({ tenant_id: acme.id, priority: 100 });
});

test("a token has 32 live streams at most; one that ends makes room, and others' do not count", async () => {
  const { token } = await api.makeTenant(`many-${uuidv7()}`);
  const open = async (mine: string): Promise<Response> =>
    await api.app.request("/api/v1/events", {
      headers: { authorization: `Bearer ${mine}`, accept: "text/event-stream" },
    });
  const streams = await Promise.all(Array.from({ length: 32 }, () => open(token)));
  expect(streams.map((stream) => stream.status)).toEqual(Array.from({ length: 32 }, () => 200));
  const refused = await open(token);
  expect(refused.status).toBe(429);
  expect(await refused.json()).toMatchObject({ code: "too-many-streams" });
  const other = await open(acme.token);
  expect(other.status).toBe(200);
  await streams[0]?.body?.cancel();
  const again = await open(token);
  expect(again.status).toBe(200);
  for (const stream of [other, again, ...streams.slice(1)]) await stream.body?.cancel();
});

const anonymous = ({ instance: _i, request_id: _r, detail, ...rest }: Record<string, unknown>) => ({
  ...rest,
  detail: String(detail).replaceAll(/[0-9a-f-]{36}/g, "<id>"),
});

const chunk = (stream: 1 | 2, text: string | Uint8Array): LogChunk => ({
  stream,
  data: Buffer.from(text as string),
});

async function placed(): Promise<{ id: string; serverId: string }> {
  const server = await api.makeServer(`logs-${uuidv7()}`);
  const { json } = await create(acme.token);
  await api.deps.sql`
    update allocations set state = 'active', server_id = ${server.id} where id = ${json.id}`;
  return { id: json.id as string, serverId: server.id };
}

/** Says "tick" for ever, as a container does, until it is told to stop. */
function endless(onEnd: () => void): (signal: AbortSignal) => AsyncIterable<LogChunk> {
  return async function* (signal) {
    try {
      while (!signal.aborted) {
        yield chunk(1, "tick\n");
        await new Promise((resolve) => setTimeout(resolve, 5));
      }
    } finally {
      onEnd();
    }
  };
}

async function follow(id: string, token: string): Promise<ReadableStreamDefaultReader<Uint8Array>> {
  const response = await api.app.request(`/api/v1/allocations/${id}/logs?follow=true`, {
    headers: { authorization: `Bearer ${token}` },
  });
  expect(response.status).toBe(200);
  const reader = (response.body as ReadableStream<Uint8Array>).getReader();
  const first = await reader.read();
  expect(Buffer.from(first.value ?? []).toString()).toBe("tick\n");
  return reader;
}

function linesOf(text: string): string[] {
  return text.split("\n").filter((line) => line !== "");
}

describe("asking for an allocation", () => {
  test("is accepted as queued, with its place", async () => {
    const answer = await create(acme.token);
    expect(answer.status).toBe(202);
    expect(answer.json).toMatchObject({ state: "queued", tenant_id: acme.id, server_id: null });
    expect(answer.headers.get("location")).toBe(`/api/v1/allocations/${answer.json.id}`);
  });

  test("secret values never come back", async () => {
    const made = await create(acme.token, {
      ...request,
      container: {
        ...request.container,
        secret_environment: { API_KEY: "hunter2-secret" },
        registry: { username: "robot", password: "hunter2-password" },
      },
    });
    expect(made.status).toBe(202);
    const shown = await api.call("GET", `/api/v1/allocations/${made.json.id}`, { token: acme.token });
    const stored = await api.deps.sql`select request, observed from allocations where id = ${made.json.id}`;
    const events = await api.deps
      .sql`select * from outbox union all select id, type, severity, tenant_id, server_id,
      gpu_id, allocation_id, actor, message, data, occurred_at from events`;
    for (const text of [made.json, shown.json, stored, events, api.logLines].map((it) =>
      JSON.stringify(it),
    )) {
      expect(text).not.toContain("hunter2");
    }
    expect(shown.json.request.container.secret_environment_names).toEqual(["API_KEY"]);
  });

  test("a repeated request with its key is the same allocation; another body is refused", async () => {
    const headers = { "idempotency-key": "deploy-42" };
    const first = await create(acme.token, request, headers);
    const again = await create(acme.token, request, headers);
    expect(again.status).toBe(202);
    expect(again.json.id).toBe(first.json.id);
    expect(first.headers.get("idempotent-replayed")).toBeNull();
    expect(again.headers.get("idempotent-replayed")).toBe("true");
    const other = await create(acme.token, { ...request, name: "other" }, headers);
    expect(other).toMatchObject({ status: 422, json: { code: "idempotency-key-reused" } });
    // Keys are per tenant.
    const foreign = await create(globex.token, request, headers);
    expect(foreign.json.id).not.toBe(first.json.id);
  });

  test("the same key at the same time makes one allocation", async () => {
    const headers = { "idempotency-key": "race-1" };
    const answers = await Promise.all(Array.from({ length: 8 }, () => create(acme.token, request, headers)));
    expect(new Set(answers.map((answer) => answer.json.id)).size).toBe(1);
  });

  test("an admin acts for the named tenant, or for the default one", async () => {
    const named = await create(api.adminToken, { ...request, tenant_id: acme.id });
    expect(named.json.tenant_id).toBe(acme.id);
    const unnamed = await create(api.adminToken);
    const [tenant] = await api.deps.sql<{ id: string }[]>`select id from tenants where name = 'default'`;
    expect(unnamed.json.tenant_id).toBe(tenant?.id);
    const unknown = await create(api.adminToken, { ...request, tenant_id: uuidv7() });
    expect(unknown).toMatchObject({ status: 404, json: { code: "tenant-not-found" } });
  });
});

describe("a tenant and another tenant's allocation", () => {
  let foreign = "";
  beforeAll(async () => {
    foreign = (await create(globex.token)).json.id as string;
  });

  test.each([
    ["GET", ""],
    ["DELETE", ""],
    ["GET", "/logs"],
    ["POST", "/extend"],
  ])("%s %s answers as if there were none", async (method, suffix) => {
    const json = suffix === "/extend" ? { extend_seconds: 60 } : undefined;
    const path = (id: string): string => `/api/v1/allocations/${id}${suffix}`;
    const absent = await api.call(method, path(uuidv7()), { token: acme.token, json });
    const answer = await api.call(method, path(foreign), { token: acme.token, json });
    expect(answer).toMatchObject({ status: 404, json: { code: "allocation-not-found" } });
    expect(anonymous(answer.json)).toEqual(anonymous(absent.json));
    const untouched = await api.call("GET", path(foreign).replace(suffix, ""), { token: globex.token });
    expect(untouched.json.state).toBe("queued");
  });

  test("lists, also with the other's id as a filter, hold one's own only", async () => {
    for (const query of ["", `?tenant_id=${globex.id}`, "?state=queued"]) {
      const list = await api.call("GET", `/api/v1/allocations${query}`, { token: acme.token });
      const tenants = list.json.items.map((item: { tenant_id: string }) => item.tenant_id);
      expect(tenants.filter((id: string) => id !== acme.id)).toEqual([]);
    }
    const everything = await api.call("GET", `/api/v1/allocations?tenant_id=${globex.id}`, {
      token: operator,
    });
    expect(everything.json.items.map((item: { id: string }) => item.id)).toContain(foreign);
  });

  test("asking in the other's name is refused", async () => {
    const answer = await create(acme.token, { ...request, tenant_id: globex.id });
    expect(answer).toMatchObject({ status: 404, json: { code: "tenant-not-found" } });
  });

  test("a tenant's cursor used by another gives nothing foreign", async () => {
    await create(acme.token);
    const page = await api.call("GET", "/api/v1/allocations?limit=1", { token: acme.token });
    const answer = await api.call("GET", `/api/v1/allocations?limit=1&cursor=${page.json.next_cursor}`, {
      token: globex.token,
    });
    expect(answer).toMatchObject({ status: 400, json: { code: "invalid-cursor" } });
  });

  test("events of the other are not shown, listed or streamed", async () => {
    await expect
      .poll(async () => (await api.call("GET", "/api/v1/events?limit=500")).json.items.length, {
        timeout: 10_000,
      })
      .toBeGreaterThan(3);
    const list = await api.call("GET", `/api/v1/events?limit=500&tenant_id=${globex.id}`, {
      token: acme.token,
    });
    const tenants = new Set(list.json.items.map((item: { tenant_id: string }) => item.tenant_id));
    expect([...tenants].filter((id) => id !== acme.id)).toEqual([]);
  });
});

describe("releasing and extending", () => {
  test("a queued allocation ends as cancelled; twice is once", async () => {
    const { json } = await create(acme.token);
    const path = `/api/v1/allocations/${json.id}`;
    const released = await api.call("DELETE", path, { token: acme.token });
    expect(released).toMatchObject({ status: 202, json: { state: "ended", end_reason: "cancelled" } });
    const again = await api.call("DELETE", path, { token: acme.token });
    expect(again).toMatchObject({ status: 202, json: { state: "ended", end_reason: "cancelled" } });
    const extended = await api.call("POST", `${path}/extend`, {
      token: acme.token,
      json: { extend_seconds: 60 },
    });
    expect(extended.status).toBe(409);
  });

  test("a lease beyond the most is refused", async () => {
    const { json } = await create(acme.token);
    const path = `/api/v1/allocations/${json.id}/extend`;
    const long = await api.call("POST", path, { token: acme.token, json: { extend_seconds: 30 * 86_400 } });
    expect(long.json.code).toBe("lease-too-long");
    const fine = await api.call("POST", path, { token: acme.token, json: { extend_seconds: 60 } });
    expect(fine).toMatchObject({ status: 200, json: { lease_seconds: 86_460 } });
  });
});

describe("pages", () => {
  test("go through every allocation once, newest first, while others are added", async () => {
    const { token } = await api.makeTenant("pager");
    const ids: string[] = [];
    for (let index = 0; index < 5; index += 1) ids.push((await create(token)).json.id as string);
    const seen: string[] = [];
    let cursor = "";
    do {
      const page = await api.call(
        "GET",
        `/api/v1/allocations?limit=2${cursor === "" ? "" : `&cursor=${cursor}`}`,
        {
          token,
        },
      );
      seen.push(...page.json.items.map((item: { id: string }) => item.id));
      cursor = page.json.next_cursor ?? "";
      await create(token);
    } while (cursor !== "");
    expect(seen).toEqual([...ids].reverse());
  });
});

describe("logs", () => {
  test("of an allocation on no server are refused in words", async () => {
    const { json } = await create(acme.token);
    const answer = await api.call("GET", `/api/v1/allocations/${json.id}/logs`, { token: acme.token });
    expect(answer).toMatchObject({ status: 409, json: { code: "logs-not-available" } });
  });

  test("of a server whose agent is away are refused before the answer begins", async () => {
    const { id } = await placed();
    const answer = await api.call("GET", `/api/v1/allocations/${id}/logs`, { token: acme.token });
    expect(answer).toMatchObject({ status: 409, json: { code: "agent-not-connected" } });
  });

  test("of a container that is gone are what was kept, for its tenant and operators", async () => {
    const { id, serverId } = await placed();
    await api.deps
      .sql`update allocations set output_tail = ${Buffer.from("one\ntwo\nthree\n")} where id = ${id}`;
    const path = `/api/v1/allocations/${id}/logs`;
    const kept = async (token: string, query = "") => {
      const answer = await api.call("GET", `${path}${query}`, { token });
      return [answer.status, answer.headers.get("palebluedot-output"), answer.json] as const;
    };
    // Its server is away; then there, without the container; then the allocation has ended.
    expect(await kept(acme.token)).toEqual([200, "end", "one\ntwo\nthree\n"]);
    api.logs.set(serverId, async function* () {
      await Promise.reject(
        new PlatformError({ code: "workload-not-found", kind: "not-found", message: "no container" }),
      );
      yield chunk(1, "");
    });
    expect(await kept(acme.token, "?tail=2")).toEqual([200, "end", "two\nthree\n"]);
    await api.deps.sql`
      update allocations set state = 'ended', end_reason = 'failed', ended_at = now() where id = ${id}`;
    expect(await kept(operator, "?tail=7")).toEqual([200, "end", "one\ntwo\nthree\n"]);
    const [foreign] = await kept(globex.token);
    expect(foreign).toBe(404);
    const json = await api.call("GET", path, {
      token: acme.token,
      headers: { accept: "application/x-ndjson" },
    });
    expect(JSON.parse(json.json as string)).toEqual({ stream: "merged", data: "one\ntwo\nthree\n" });
    const list = await api.call("GET", "/api/v1/allocations", { token: acme.token });
    expect(JSON.stringify(list.json)).not.toContain("output_tail");
    await api.deps.sql`update allocations set output_tail = null where id = ${id}`;
    expect(await kept(acme.token)).toMatchObject([409, null, { code: "logs-not-available" }]);
  });

  test("come as text, or as JSON lines with whole characters", async () => {
    const { id, serverId } = await placed();
    const euro = Buffer.from("€");
    api.logs.set(serverId, async function* () {
      yield chunk(1, "one\n");
      yield chunk(1, euro.subarray(0, 1));
      yield chunk(2, "two\n");
      yield await Promise.resolve(chunk(1, euro.subarray(1)));
    });
    const path = `/api/v1/allocations/${id}/logs`;
    const json = await api.call("GET", path, {
      token: acme.token,
      headers: { accept: "application/x-ndjson" },
    });
    const lines = linesOf(json.json).map((line) => JSON.parse(line) as { stream: string; data: string });
    expect(lines).toEqual([
      { stream: "stdout", data: "one\n" },
      { stream: "stderr", data: "two\n" },
      { stream: "stdout", data: "€" },
    ]);
    const text = await api.app.request(path, { headers: { authorization: `Bearer ${acme.token}` } });
    expect(text.headers.get("content-type")).toBe("text/plain; charset=utf-8");
    expect((await text.arrayBuffer()).byteLength).toBe(11);
  });

  test("stop when the reader goes away", async () => {
    const { id, serverId } = await placed();
    let ended = 0;
    api.logs.set(
      serverId,
      endless(() => (ended += 1)),
    );
    const reader = await follow(id, acme.token);
    await reader.cancel();
    await expect.poll(() => ended, { timeout: 10_000 }).toBe(1);
  });

  test("stop when the reader's token is revoked", async () => {
    const { id, serverId } = await placed();
    const made = await api.call("POST", `/api/v1/tenants/${acme.id}/tokens`, { json: { name: "reader" } });
    api.logs.set(
      serverId,
      endless(() => undefined),
    );
    const reader = await follow(id, made.json.token as string);
    await api.call("DELETE", `/api/v1/tenants/${acme.id}/tokens/${made.json.id}`);
    for (const deadline = Date.now() + 10_000; !(await reader.read()).done;) {
      expect(Date.now()).toBeLessThan(deadline);
    }
  });
});
