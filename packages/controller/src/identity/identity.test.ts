import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { createNotifications } from "../db/notifications.ts";
import { createTestApi, type TestApi } from "../http/testing.ts";
import { createIdentityService } from "./identity.ts";
import { createRateLimiter } from "./rate-limit.ts";

let api: TestApi;
beforeAll(async () => {
  api = await createTestApi({ PALEBLUEDOT_RATE_LIMIT_PER_SECOND: "1000" });
});
afterAll(() => api.close());

const whoami = (token: string) => api.call("GET", "/api/v1/whoami", { token });

async function until(condition: () => Promise<boolean>): Promise<void> {
  for (const deadline = Date.now() + 10_000; !(await condition());) {
    if (Date.now() > deadline) throw new Error("the condition did not come true in time");
    await new Promise((resolve) => setTimeout(resolve, 10));
  }
}

describe("the role metrics", () => {
  test("reads metrics and targets, and nothing else", async () => {
    const made = await api.call("POST", "/api/v1/tokens", { json: { name: "prometheus", role: "metrics" } });
    expect(made.status).toBe(201);
    const token = made.json.token as string;
    expect(token).toMatch(/^pbm_/);
    const status = async (path: string): Promise<number> => (await api.call("GET", path, { token })).status;
    expect(await status("/metrics")).toBe(200);
    expect(await status("/api/v1/prometheus/targets")).toBe(200);
    expect(await status("/api/v1/whoami")).toBe(200);
    for (const path of ["servers", "gpus", "allocations", "events", "capacity", "tokens", "tenants"]) {
      expect(await status(`/api/v1/${path}`), path).toBe(403);
    }
  });
});

describe("the first admin token", () => {
  test("is an admin's and is stored hashed only", async () => {
    const answer = await whoami(api.adminToken);
    expect(answer.json).toMatchObject({ role: "admin", tenant_id: null, token_name: "bootstrap" });
    const dump = JSON.stringify(await api.deps.sql`select * from api_tokens`);
    expect(dump).not.toContain(api.adminToken);
  });

  test("is made once, also by racing replicas", async () => {
    await api.deps.sql`delete from api_tokens`;
    const stored: string[] = [];
    const store = (token: string): Promise<void> => {
      stored.push(token);
      return Promise.resolve();
    };
    const outcomes = await Promise.all(Array.from({ length: 4 }, () => api.identity.bootstrap(store)));
    expect(outcomes.filter((outcome) => outcome.made)).toHaveLength(1);
    expect(stored).toHaveLength(1);
    const tokens = await api.deps.sql`select 1 from api_tokens where role = 'admin'`;
    expect(tokens).toHaveLength(1);
    const tenants = await api.deps.sql`select 1 from tenants where name = 'default'`;
    expect(tenants).toHaveLength(1);
  });

  test("does not exist when it could not be stored", async () => {
    await api.deps.sql`delete from api_tokens`;
    const failed = api.identity.bootstrap(() => Promise.reject(new Error("disk full")));
    await expect(failed).rejects.toThrow("disk full");
    expect(await api.deps.sql`select 1 from api_tokens`).toHaveLength(0);
  });

  test("is replaced by a reset, at once", async () => {
    let first = "";
    let second = "";
    await api.identity.resetAdminToken((token) => Promise.resolve(void (first = token)));
    expect((await whoami(first)).status).toBe(200);
    await api.identity.resetAdminToken((token) => Promise.resolve(void (second = token)));
    expect((await whoami(second)).status).toBe(200);
    await until(async () => (await whoami(first)).status === 401);
  });
});

describe("tenants and their tokens", () => {
  let admin = "";
  beforeAll(async () => {
    admin = await api.makeStaff("admin");
  });

  test("a tenant's name is taken once", async () => {
    const first = await api.call("POST", "/api/v1/tenants", { token: admin, json: { name: "acme" } });
    expect(first.status).toBe(201);
    const again = await api.call("POST", "/api/v1/tenants", { token: admin, json: { name: "acme" } });
    expect(again).toMatchObject({ status: 409, json: { code: "tenant-name-taken" } });
  });

  test("a token works until it is revoked, and then not once more", async () => {
    const { id, token: bystander } = await api.makeTenant("revoked");
    const made = await api.call("POST", `/api/v1/tenants/${id}/tokens`, {
      token: admin,
      json: { name: "ci" },
    });
    expect(made.status).toBe(201);
    expect(made.json.token).toMatch(/^pbt_/);
    // Cached by now.
    expect((await whoami(made.json.token)).json).toMatchObject({ role: "member", tenant_id: id });
    const revoked = await api.call("DELETE", `/api/v1/tenants/${id}/tokens/${made.json.id}`, {
      token: admin,
    });
    expect(revoked.status).toBe(200);
    expect((await whoami(made.json.token)).status).toBe(401);
    expect((await whoami(bystander)).status).toBe(200);
    const list = await api.call("GET", `/api/v1/tenants/${id}/tokens`, { token: admin });
    expect(list.json.items).toHaveLength(2);
    expect(JSON.stringify(list.json)).not.toContain("pbt_");
  });

  test("another replica that has the token cached hears of the revocation", async () => {
    const { id } = await api.makeTenant("replicas");
    const made = await api.call("POST", `/api/v1/tenants/${id}/tokens`, {
      token: admin,
      json: { name: "ci" },
    });
    const notifications = createNotifications(api.deps.sql, { log: api.deps.log });
    const other = createIdentityService({ ...api.deps, notifications });
    try {
      await other.authenticate(made.json.token, "10.0.0.1");
      await api.call("DELETE", `/api/v1/tenants/${id}/tokens/${made.json.id}`, { token: admin });
      await until(() =>
        other.authenticate(made.json.token, "10.0.0.1").then(
          () => false,
          () => true,
        ),
      );
    } finally {
      other.stop();
      await notifications.close();
    }
  });

  test("a stream's watch ends with its token", async () => {
    const { id } = await api.makeTenant("watched");
    const made = await api.call("POST", `/api/v1/tenants/${id}/tokens`, {
      token: admin,
      json: { name: "ci" },
    });
    const watch = api.identity.watch(made.json.id);
    await api.call("DELETE", `/api/v1/tenants/${id}/tokens/${made.json.id}`, { token: admin });
    await until(() => Promise.resolve(watch.signal.aborted));
    watch.end();
  });

  test("an expired token is refused, also while it is cached", async () => {
    const { id } = await api.makeTenant("expiring");
    const expires_at = new Date(api.clock.now() + 5000).toISOString();
    const made = await api.call("POST", `/api/v1/tenants/${id}/tokens`, {
      token: admin,
      json: { name: "short", expires_at },
    });
    expect((await whoami(made.json.token)).status).toBe(200);
    api.clock.advance(6000);
    expect((await whoami(made.json.token)).status).toBe(401);
  });

  test("an expiry in the past is refused", async () => {
    const { id } = await api.makeTenant("past");
    const answer = await api.call("POST", `/api/v1/tenants/${id}/tokens`, {
      token: admin,
      json: { name: "old", expires_at: "2020-01-01T00:00:00Z" },
    });
    expect(answer).toMatchObject({ status: 422, json: { code: "expiry-in-the-past" } });
  });

  test("a token is revoked under its own tenant only", async () => {
    const one = await api.makeTenant("one");
    const two = await api.makeTenant("two");
    const list = await api.call("GET", `/api/v1/tenants/${one.id}/tokens`, { token: admin });
    const answer = await api.call("DELETE", `/api/v1/tenants/${two.id}/tokens/${list.json.items[0].id}`, {
      token: admin,
    });
    expect(answer).toMatchObject({ status: 404, json: { code: "token-not-found" } });
    expect((await whoami(one.token)).status).toBe(200);
  });

  test("tokens of a disabled tenant are refused", async () => {
    const { id, token } = await api.makeTenant("disabled");
    await api.deps.sql`update tenants set disabled_at = now() where id = ${id}`;
    expect((await whoami(token)).status).toBe(401);
  });

  test("pages go through all tenants once", async () => {
    const seen: string[] = [];
    let cursor = "";
    do {
      const page = await api.call(
        "GET",
        `/api/v1/tenants?limit=2${cursor === "" ? "" : `&cursor=${cursor}`}`,
        {
          token: admin,
        },
      );
      seen.push(...page.json.items.map((item: { name: string }) => item.name));
      cursor = page.json.next_cursor ?? "";
    } while (cursor !== "");
    expect(new Set(seen).size).toBe(seen.length);
    const [row] = await api.deps.sql<{ count: number }[]>`select count(*)::int as count from tenants`;
    expect(seen).toHaveLength(row?.count ?? -1);
  });
});

describe("rate limits", () => {
  test("failed tries from one address are cut off; a known token and another address are not", async () => {
    const { token } = await api.makeTenant("limited");
    await api.identity.authenticate(token, "192.0.2.1");
    const tries: string[] = [];
    for (let index = 0; index < 40; index += 1) {
      await api.identity
        .authenticate(`pbt_${"x".repeat(41)}${String(index).padStart(2, "0")}`, "192.0.2.1")
        .catch((error: { code: string }) => tries.push(error.code));
    }
    expect(tries.slice(0, 20)).toEqual(Array.from({ length: 20 }, () => "unauthenticated"));
    expect(new Set(tries.slice(20))).toEqual(new Set(["rate-limited"]));
    await expect(api.identity.authenticate(token, "192.0.2.1")).resolves.toMatchObject({ role: "member" });
    await expect(api.identity.authenticate("nonsense", "192.0.2.2")).rejects.toMatchObject({
      code: "unauthenticated",
    });
  });

  test("one credential's requests are limited, with Retry-After, and recover", async () => {
    const slow = await createTestApi({ PALEBLUEDOT_RATE_LIMIT_PER_SECOND: "2" });
    try {
      const frozen = slow.clock.now();
      slow.clock.now = () => frozen;
      const { token } = await slow.makeTenant("busy");
      const statuses: number[] = [];
      for (let index = 0; index < 5; index += 1) {
        statuses.push((await slow.call("GET", "/api/v1/whoami", { token })).status);
      }
      expect(statuses).toEqual([200, 200, 200, 200, 429]);
      const refused = await slow.call("GET", "/api/v1/whoami", { token });
      expect(refused.json.code).toBe("rate-limited");
      expect(Number(refused.headers.get("retry-after"))).toBeGreaterThan(0);
      expect((await slow.call("GET", "/api/v1/whoami")).status).toBe(200);
      slow.clock.now = () => frozen + 1000;
      expect((await slow.call("GET", "/api/v1/whoami", { token })).status).toBe(200);
    } finally {
      await slow.close();
    }
  });

  test("the limiter keeps a bounded number of keys", () => {
    const limiter = createRateLimiter({
      clock: { now: () => 0, sleep: () => Promise.resolve() },
      perSecond: 1,
      burst: 1,
      maxKeys: 2,
    });
    expect([limiter.take("a"), limiter.take("a")]).toEqual([0, 1]);
    limiter.take("b");
    limiter.take("c");
    // "a" was pushed out: its bucket is full again.
    expect(limiter.peek("a")).toBe(0);
    expect(limiter.peek("c")).toBe(1);
  });
});
