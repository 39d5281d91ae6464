import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { maxBodyBytes } from "./body.ts";
import { encodeCursor } from "./cursor.ts";
import { createTestApi, type TestApi } from "./testing.ts";

let api: TestApi;
beforeAll(async () => {
  api = await createTestApi();
});
afterAll(() => api.close());

const container = { image: "registry.example/app:1" };
const someId = "01890a5d-ac96-774b-bcce-b302099a8057";

/** What must not change, whatever is thrown at the API. */
async function contents(): Promise<unknown> {
  const [row] = await api.deps.sql`
    select (select count(*)::int from allocations) as allocations, (select count(*)::int from servers) as servers,
      (select count(*)::int from tenants) as tenants, (select count(*)::int from api_tokens) as tokens,
      (select count(*)::int from join_tokens) as join_tokens, (select count(*)::int from outbox) +
      (select count(*)::int from events) as events`;
  return row;
}

async function expectProblem(
  answer: Awaited<ReturnType<TestApi["call"]>>,
  status: number,
  code: string,
): Promise<void> {
  expect(answer.json).toMatchObject({ status, code, type: `urn:palebluedot:problem:${code}` });
  expect(answer.status).toBe(status);
  expect(answer.headers.get("content-type")).toBe("application/problem+json");
  expect(answer.json.hint.length).toBeGreaterThan(5);
  expect(answer.json.detail.length).toBeGreaterThan(5);
  expect(answer.json.request_id).toBe(answer.headers.get("x-request-id"));
}

describe("allocation requests that are refused", () => {
  test.each([
    ["no GPUs named", {}, "/gpus"],
    ["zero GPUs", { gpus: { count: 0 }, container }, "/gpus/count"],
    ["a negative count", { gpus: { count: -1 }, container }, "/gpus/count"],
    ["a huge count", { gpus: { count: 1e9 }, container }, "/gpus/count"],
    ["a count beyond exact numbers", { gpus: { count: 1e300 }, container }, "/gpus/count"],
    ["a fraction of a GPU", { gpus: { count: 1.5 }, container }, "/gpus/count"],
    ["a count as text", { gpus: { count: "2" }, container }, "/gpus/count"],
    ["a count of null", { gpus: { count: null }, container }, "/gpus/count"],
    ["an unknown field", { gpus: { count: 1 }, container, colour: "blue" }, "/colour"],
    ["an unknown field inside", { gpus: { count: 1, modell: "H100" }, container }, "/gpus/modell"],
    ["an image with a space", { gpus: { count: 1 }, container: { image: "a b" } }, "/container/image"],
    ["control characters in a name", { gpus: { count: 1 }, container, name: "a\u001b[31mb" }, "/name"],
    ["a lease of a second", { gpus: { count: 1 }, container, lease_seconds: 1 }, "/lease_seconds"],
    ["a body that is a list", [], ""],
    [
      "a prototype as a field",
      JSON.parse('{"gpus":{"count":1},"container":{"image":"a"},"__proto__":{}}'),
      "/__proto__",
    ],
  ])("%s", async (_name, json, pointer) => {
    const before = await contents();
    const answer = await api.call("POST", "/api/v1/allocations", { json });
    await expectProblem(answer, 422, "invalid-request");
    expect(answer.json.errors.map((fault: { pointer: string }) => fault.pointer)).toContain(pointer);
    expect(await contents()).toEqual(before);
  });

  test("every unknown field is named", async () => {
    const answer = await api.call("POST", "/api/v1/allocations", {
      json: { gpus: { count: 1, x: 1 }, container, y: 2, "a/b~c": 3 },
    });
    const faults = answer.json.errors.filter((fault: { code: string }) => fault.code === "unknown-field");
    expect(faults.map((fault: { pointer: string }) => fault.pointer).sort()).toEqual([
      "/a~1b~0c",
      "/gpus/x",
      "/y",
    ]);
  });

  test("an idempotency key that is no key", async () => {
    for (const key of ["", "a b", "x".repeat(256)]) {
      const answer = await api.call("POST", "/api/v1/allocations", {
        json: { gpus: { count: 1 }, container },
        headers: { "idempotency-key": key },
      });
      await expectProblem(answer, 400, "invalid-idempotency-key");
    }
  });
});

describe("bodies that cannot be read", () => {
  const path = "/api/v1/tenants";
  const json = { "content-type": "application/json" };
  test.each([
    ["not JSON", "{", json, 400, "invalid-json"],
    ["JSON with a trailing comma", '{"name":"a",}', json, 400, "invalid-json"],
    ["nothing at all", "", json, 400, "body-missing"],
    [
      "a form",
      "name=a",
      { "content-type": "application/x-www-form-urlencoded" },
      415,
      "unsupported-media-type",
    ],
    ["text", '{"name":"a"}', { "content-type": "text/plain" }, 415, "unsupported-media-type"],
    [
      "another character set",
      '{"name":"a"}',
      { "content-type": "application/json; charset=latin1" },
      415,
      "unsupported-media-type",
    ],
    ["NUL in a text", '{"name":"a\\u0000b"}', json, 400, "invalid-text"],
    ["half a surrogate pair", '{"name":"\\ud800"}', json, 400, "invalid-text"],
    ["NUL in a field's name", '{"\\u0000":1}', json, 400, "invalid-text"],
    ["deep nesting", `{"name":${"[".repeat(5000)}${"]".repeat(5000)}}`, json, 400, "nested-too-deep"],
    ["too much", JSON.stringify({ name: "a".repeat(maxBodyBytes) }), json, 413, "body-too-large"],
  ])("%s", async (_name, body, headers, status, code) => {
    const before = await contents();
    await expectProblem(await api.call("POST", path, { body, headers }), status, code);
    expect(await contents()).toEqual(before);
  });

  test("invalid UTF-8", async () => {
    const body = Buffer.concat([Buffer.from('{"name":"'), Buffer.of(0xff, 0xfe), Buffer.from('"}')]);
    await expectProblem(await api.call("POST", path, { body }), 400, "invalid-utf8");
  });

  test("too much without saying so: the stream is cut, not collected", async () => {
    let sent = 0;
    const endless = new ReadableStream<Uint8Array>({
      pull(controller) {
        sent += 65_536;
        controller.enqueue(new Uint8Array(65_536).fill(0x20));
      },
    });
    const response = await api.app.request(path, {
      method: "POST",
      headers: { authorization: `Bearer ${api.adminToken}`, ...json },
      body: endless,
      duplex: "half",
    });
    expect(response.status).toBe(413);
    expect(sent).toBeLessThan(maxBodyBytes * 2);
  });
});

describe("parameters and paths that are wrong", () => {
  const foreignCursor = encodeCursor(["tenants"], someId);
  test.each([
    ["a limit of zero", "/api/v1/servers?limit=0", 400, "invalid-parameter"],
    ["a limit beyond the most", "/api/v1/servers?limit=501", 400, "invalid-parameter"],
    ["a limit that is no number", "/api/v1/servers?limit=ten", 400, "invalid-parameter"],
    ["an empty limit", "/api/v1/servers?limit=", 400, "invalid-parameter"],
    ["a limit given twice", "/api/v1/servers?limit=1&limit=2", 400, "invalid-parameter"],
    ["an unknown parameter", "/api/v1/servers?limt=1", 400, "invalid-parameter"],
    ["an unknown state", "/api/v1/servers?state=broken", 400, "invalid-parameter"],
    ["invalid UTF-8 in a filter", "/api/v1/servers?q=%ff", 400, "invalid-url-encoding"],
    ["half a percent escape", "/api/v1/servers?q=%z", 400, "invalid-url-encoding"],
    ["invalid UTF-8 in an id", "/api/v1/servers/%ff", 404, "server-not-found"],
    ["NUL in a filter", "/api/v1/servers?q=%00", 400, "invalid-text"],
    ["a cursor that is noise", "/api/v1/servers?cursor=%7B%7D", 400, "invalid-cursor"],
    [
      "a cursor that is JSON of another kind",
      `/api/v1/servers?cursor=${Buffer.from('{"s":1}').toString("base64url")}`,
      400,
      "invalid-cursor",
    ],
    ["a cursor of another list", `/api/v1/servers?cursor=${foreignCursor}`, 400, "invalid-cursor"],
    [
      "a cursor whose key is no id",
      `/api/v1/tenants?cursor=${encodeCursor(["tenants"], "' or 1=1 --")}`,
      400,
      "invalid-cursor",
    ],
    [
      "a cursor of other filters",
      `/api/v1/events?type=gpu.&cursor=${encodeCursor(["events", {}, "descending", null], "5")}`,
      400,
      "invalid-cursor",
    ],
    ["a window of zero", `/api/v1/gpus/${someId}/metrics?window_seconds=0`, 400, "invalid-parameter"],
    ["an id that is no UUID", "/api/v1/servers/1%27%20or%201=1", 404, "server-not-found"],
    ["an unknown server", `/api/v1/servers/${someId}`, 404, "server-not-found"],
    ["an unknown GPU", `/api/v1/gpus/${someId}`, 404, "gpu-not-found"],
    ["an unknown allocation", `/api/v1/allocations/${someId}`, 404, "allocation-not-found"],
    ["an unknown tenant", `/api/v1/tenants/${someId}/tokens`, 404, "tenant-not-found"],
    ["an unknown path", "/api/v1/serverz", 404, "path-not-found"],
    ["a path with a slash too many", "/api/v1/servers/", 404, "path-not-found"],
    ["the root", "/", 404, "path-not-found"],
  ])("%s", async (_name, path, status, code) => {
    await expectProblem(await api.call("GET", path), status, code);
  });

  test("a method that the path does not take", async () => {
    const answer = await api.call("PUT", "/api/v1/servers");
    await expectProblem(answer, 405, "method-not-allowed");
    expect(answer.headers.get("allow")).toBe("GET, HEAD, POST");
    await expectProblem(await api.call("DELETE", "/healthz"), 405, "method-not-allowed");
  });

  test("authentication comes before everything that tells of the route's insides", async () => {
    const answer = await api.call("POST", "/api/v1/tenants", { token: "", body: "{" });
    await expectProblem(answer, 401, "unauthenticated");
  });
});

describe("every answer", () => {
  test("carries a request id: the caller's if it is sane, else ours", async () => {
    const given = await api.call("GET", "/healthz", { headers: { "x-request-id": "abc-123" } });
    expect(given.headers.get("x-request-id")).toBe("abc-123");
    const insane = await api.call("GET", "/healthz", { headers: { "x-request-id": 'a"b\tc' } });
    expect(insane.headers.get("x-request-id")).toMatch(/^[0-9a-f-]{36}$/);
  });

  test("carries security headers, also a problem", async () => {
    for (const path of ["/healthz", "/nowhere"]) {
      const { headers } = await api.call("GET", path);
      expect(headers.get("x-content-type-options")).toBe("nosniff");
      expect(headers.get("content-security-policy")).toContain("default-src 'none'");
    }
  });

  test("leaves one log line, without the token", async () => {
    api.logLines.length = 0;
    await api.call("GET", "/api/v1/servers?limit=0", { headers: { "x-request-id": "logged-1" } });
    const lines = api.logLines.filter((line) => line["request_id"] === "logged-1");
    expect(lines).toHaveLength(1);
    expect(lines[0]).toMatchObject({
      event: "http-request",
      method: "GET",
      route: "/api/v1/servers",
      status: 400,
      code: "invalid-parameter",
    });
    expect(JSON.stringify(api.logLines)).not.toContain(api.adminToken);
  });

  test("counts in the histogram under its route's template", async () => {
    await api.call("GET", `/api/v1/servers/${someId}`);
    const { json } = await api.call("GET", "/metrics");
    expect(json).toContain(
      'palebluedot_http_request_duration_seconds_count{method="GET",route="/api/v1/servers/{id}",status="404"}',
    );
  });

  test("tells nothing of a bug but the request's id", async () => {
    const original = api.deps.sql;
    await original`alter table servers rename to servers_hidden`;
    try {
      const answer = await api.call("GET", "/api/v1/servers", { headers: { "x-request-id": "bug-1" } });
      await expectProblem(answer, 500, "internal-error");
      expect(JSON.stringify(answer.json)).not.toMatch(/relation|servers_hidden|select/);
      const line = api.logLines.find((entry) => entry["request_id"] === "bug-1");
      expect(String(line?.["error"])).toContain("relation");
    } finally {
      await original`alter table servers_hidden rename to servers`;
    }
  });

  test("readiness names what is missing", async () => {
    expect((await api.call("GET", "/readyz", { token: "" })).status).toBe(200);
    api.readiness = [{ name: "database", ready: false, message: "the database does not answer" }];
    const answer = await api.call("GET", "/readyz", { token: "" });
    api.readiness = [{ name: "database", ready: true, message: "" }];
    expect(answer.status).toBe(503);
    expect(answer.json).toMatchObject({ ready: false, checks: [{ name: "database", ready: false }] });
  });
});
