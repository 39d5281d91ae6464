import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { createTestApi, type TestApi } from "./testing.ts";

interface Operation {
  operationId: string;
  summary: string;
  tags: string[];
  security: unknown[];
  parameters?: { name: string; in: string; required?: boolean }[];
  requestBody?: { content: Record<string, { schema?: unknown }> };
  responses: Record<string, { description: string; content?: Record<string, { schema?: unknown }> }>;
}

interface OpenApi {
  openapi: string;
  paths: Record<string, Record<string, Operation>>;
  components: { schemas: Record<string, unknown>; securitySchemes: Record<string, unknown> };
}

let api: TestApi;
let document: OpenApi;
let operations: { path: string; method: string; operation: Operation }[] = [];

beforeAll(async () => {
  api = await createTestApi();
  document = (await api.call("GET", "/openapi.json", { token: "" })).json as OpenApi;
  operations = Object.entries(document.paths).flatMap(([path, methods]) =>
    Object.entries(methods).map(([method, operation]) => ({ path, method, operation })),
  );
});
afterAll(() => api.close());

const someId = "01890a5d-ac96-774b-bcce-b302099a8057";
const concrete = (path: string): string => path.replaceAll(/\{[a-z_]+\}/g, someId);

/** Every `$ref` in a value. */
function references(value: unknown): string[] {
  if (Array.isArray(value)) return value.flatMap(references);
  if (typeof value !== "object" || value === null) return [];
  return Object.entries(value).flatMap(([key, item]) =>
    key === "$ref" && typeof item === "string" ? [item] : references(item),
  );
}

describe("the OpenAPI document", () => {
  test("is 3.1 and describes every route that is served, and no other", () => {
    expect(document.openapi).toBe("3.1.0");
    const described = operations.map(({ path, method }) => `${method} ${path}`).sort();
    expect(described).toEqual(api.routes.map((route) => `${route.method} ${route.path}`).sort());
  });

  test("names each operation once, in camelCase", () => {
    const ids = operations.map(({ operation }) => operation.operationId);
    expect(new Set(ids).size).toBe(ids.length);
    for (const id of ids) expect(id).toMatch(/^[a-z][a-zA-Z]+$/);
  });

  test("resolves every reference", () => {
    const refs = new Set(references(document));
    expect(refs.size).toBeGreaterThan(5);
    for (const ref of refs) {
      const name = /^#\/components\/schemas\/([A-Za-z0-9]+)$/.exec(ref)?.[1] ?? "";
      expect(document.components.schemas, ref).toHaveProperty(name);
    }
  });

  test("declares path parameters, a success and problems for every operation", () => {
    for (const { path, method, operation } of operations) {
      const where = `${method} ${path}`;
      const declared = (operation.parameters ?? []).filter((parameter) => parameter.in === "path");
      const inPath = [...path.matchAll(/\{([a-z_]+)\}/g)].map((match) => match[1] ?? "");
      expect(declared.map((parameter) => parameter.name).sort(), where).toEqual(inPath.sort());
      const statuses = Object.keys(operation.responses);
      expect(
        statuses.filter((status) => status.startsWith("2")),
        where,
      ).toHaveLength(1);
      for (const status of statuses.filter((status) => !status.startsWith("2"))) {
        const content = operation.responses[status]?.content ?? {};
        expect(Object.keys(content), `${where} ${status}`).toEqual(["application/problem+json"]);
      }
      expect(statuses, where).toEqual(expect.arrayContaining(["400", "500"]));
      if (operation.security.length > 0) {
        expect(statuses, where).toEqual(expect.arrayContaining(["401", "403", "429"]));
      }
      if (operation.requestBody !== undefined) {
        expect(operation.requestBody.content["application/json"]?.schema, where).toBeDefined();
        expect(statuses, where).toEqual(expect.arrayContaining(["413", "415", "422"]));
      }
    }
  });

  test("leaves only probes and the API's description open to everybody", () => {
    const open = operations.filter(({ operation }) => operation.security.length === 0);
    expect(open.map(({ path }) => path).sort()).toEqual([
      "/api/v1/healthz",
      "/api/v1/readyz",
      "/docs",
      "/healthz",
      "/openapi.json",
      "/readyz",
    ]);
  });

  test("is shown to people without scripts", async () => {
    const answer = await api.call("GET", "/docs", { token: "" });
    expect(answer.status).toBe(200);
    expect(answer.headers.get("content-security-policy")).toContain("default-src 'none'");
    for (const { operation } of operations) expect(answer.json).toContain(`id="${operation.operationId}"`);
    expect(answer.json).not.toContain("<script");
  });
});

describe("authorisation of every operation", () => {
  test("without a token, and with a wrong one, nothing but the open paths answers", async () => {
    for (const { path, method, operation } of operations) {
      if (operation.security.length === 0) continue;
      const where = `${method} ${path}`;
      const none = await api.call(method.toUpperCase(), concrete(path), { token: "" });
      expect(none.status, where).toBe(401);
      expect(none.json.code, where).toBe("unauthenticated");
      expect(none.headers.get("www-authenticate"), where).toMatch(/^Bearer/);
    }
  });

  test("a tenant's token reaches its own things only, an operator's everything but identities", async () => {
    const { token } = await api.makeTenant("authorised");
    const operator = await api.makeStaff("operator");
    const refusedTo = async (bearer: string): Promise<string[]> => {
      const refused: string[] = [];
      for (const { path, method, operation } of operations) {
        if (operation.security.length === 0 || path === "/api/v1/events") continue;
        const answer = await api.call(method.toUpperCase(), concrete(path), { token: bearer });
        if (answer.status === 403) {
          expect(answer.json.code).toBe("permission-missing");
          refused.push(operation.operationId);
        }
      }
      return refused.sort();
    };
    expect(await refusedTo(operator)).toEqual([
      "createStaffToken",
      "createTenant",
      "createTenantToken",
      "listStaffTokens",
      "listTenantTokens",
      "revokeStaffToken",
      "revokeTenantToken",
    ]);
    const allowed = [
      "createAllocation",
      "extendAllocation",
      "getAllocation",
      "getCapacity",
      "listAllocations",
      "listEvents",
      "releaseAllocation",
      "streamAllocationLogs",
      "whoAmI",
    ];
    const secured = operations.filter(({ operation }) => operation.security.length > 0);
    expect(await refusedTo(token)).toEqual(
      secured
        .map(({ operation }) => operation.operationId)
        .filter((id) => !allowed.includes(id))
        .sort(),
    );
  });
});
