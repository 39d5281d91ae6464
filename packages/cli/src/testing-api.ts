import { randomUUID } from "node:crypto";
import { once } from "node:events";
import { createServer, type IncomingMessage, type Server, type ServerResponse } from "node:http";
import type { AddressInfo } from "node:net";
import { text as readText } from "node:stream/consumers";

/**
 * A small controller API with state, for this package's tests: tokens, servers, allocations that move on
 * with each reading, join tokens, events as pages and as a live stream. Faults are set on the fields.
 */
export interface FakeApi {
  readonly url: string;
  readonly token: string;
  /** Id of the one API token that staff has, and each tenant. */
  readonly tokenId: string;
  readonly allocations: Map<string, Record<string, unknown>>;
  readonly servers: Record<string, unknown>[];
  readonly events: Record<string, unknown>[];
  /** Bodies and headers of writes as they came. */
  readonly writes: { method: string; path: string; body: unknown; headers: IncomingMessage["headers"] }[];
  /** Requests answered 503 before the next one passes. */
  failNext: number;
  /** The answer to POST allocations is lost after it was done, this often. */
  loseAnswers: number;
  /** Where allocations go when they are read again. */
  nextState: { state: string; end_reason?: string; message?: string };
  /** Largest page, whatever was asked for. */
  pageItems: number;
  /** Ends open event streams. */
  cutStreams(): void;
  publish(event: Record<string, unknown>): void;
  openStreams(): number;
  close(): Promise<void>;
}

const key = (value: string | string[] | undefined): string =>
  Array.isArray(value) ? value.join() : (value ?? "");

function problem(response: ServerResponse, status: number, code: string, extra: object = {}): void {
  response.writeHead(status, { "content-type": "application/problem+json" });
  response.end(
    JSON.stringify({
      type: `urn:palebluedot:problem:${code}`,
      title: code,
      status,
      detail: `it says ${code}`,
      code,
      hint: `mend ${code}`,
      request_id: "req-1",
      ...extra,
    }),
  );
}

function json(response: ServerResponse, status: number, value: unknown): void {
  response.writeHead(status, { "content-type": "application/json" });
  response.end(JSON.stringify(value));
}

function sendEvent(response: ServerResponse, event: Record<string, unknown>): void {
  response.write(
    `id: ${String(event["seq"])}\nevent: ${String(event["type"])}\ndata: ${JSON.stringify(event)}\n\n`,
  );
}

export async function startFakeApi(): Promise<FakeApi> {
  const streams = new Map<ServerResponse, { types: string[] }>();
  const idempotent = new Map<string, string>();
  const joinTokens: Record<string, unknown>[] = [];

  function page(response: ServerResponse, url: URL, items: readonly unknown[]): void {
    const start = Number(url.searchParams.get("cursor") ?? 0);
    const limit = Math.min(api.pageItems, Number(url.searchParams.get("limit") ?? 50));
    const end = start + limit;
    json(response, 200, {
      items: items.slice(start, end),
      next_cursor: end < items.length ? String(end) : null,
    });
  }

  function allocation(
    response: ServerResponse,
    method: string,
    id: string,
    verb: string | undefined,
    body: unknown,
  ): void {
    const found = api.allocations.get(id);
    if (found === undefined) {
      problem(response, 404, "allocation-not-found");
    } else if (method === "GET" && verb === undefined) {
      json(response, 200, found);
      Object.assign(found, api.nextState);
    } else if (method === "DELETE") {
      Object.assign(found, { state: "releasing", end_reason: "released", message: "stopping" });
      json(response, 202, found);
    } else if (verb === "extend") {
      if (found["state"] === "ended") {
        problem(response, 409, "allocation-ended");
        return;
      }
      found["lease_seconds"] =
        Number(found["lease_seconds"]) + (body as { extend_seconds: number }).extend_seconds;
      json(response, 200, found);
    } else if (verb === "logs") {
      response.writeHead(200, { "content-type": "text/plain" });
      response.write("line 1\n");
      response.end("line 2\n");
    } else {
      problem(response, 405, "method-not-allowed");
    }
  }

  async function handle(request: IncomingMessage, response: ServerResponse): Promise<void> {
    const url = new URL(request.url ?? "/", "http://fake");
    const method = request.method ?? "GET";
    const [, , , noun, id, verb] = url.pathname.split("/");
    const sent = await readText(request);
    const body: unknown = sent === "" ? undefined : JSON.parse(sent);
    if (method !== "GET") api.writes.push({ method, path: url.pathname, body, headers: request.headers });
    if (request.headers.authorization !== `Bearer ${api.token}`) {
      problem(response, 401, "token-invalid");
    } else if (api.failNext > 0) {
      api.failNext -= 1;
      problem(response, 503, "database-unavailable");
    } else if (noun === "whoami") {
      json(response, 200, { token_name: "bootstrap", role: "admin", tenant_name: null });
    } else if (noun === "servers" && id === undefined && method === "GET") {
      const q = url.searchParams.get("q");
      page(
        response,
        url,
        q === null ? api.servers : api.servers.filter((row) => String(row["name"]).includes(q)),
      );
    } else if (noun === "servers" && (verb === "approve" || verb === "reject")) {
      const server = api.servers.find((row) => row["id"] === id);
      if (server === undefined) problem(response, 404, "server-not-found");
      else json(response, 200, { server_name: server["name"], state: "approved" });
    } else if (noun === "servers" && id === undefined) {
      const made = { id: randomUUID(), state: "pending", ...(body as object) };
      api.servers.push(made);
      json(response, 201, made);
    } else if (noun === "servers") {
      const server = api.servers.find((row) => row["id"] === id);
      if (server === undefined) {
        problem(response, 404, "server-not-found");
        return;
      }
      if (method === "PATCH") Object.assign(server, body);
      if (verb === "retire" && server["gpu_claimed_count"] !== undefined) {
        problem(response, 409, "server-not-retirable");
        return;
      }
      if (verb === "retire") server["state"] = "retired";
      if (verb === "revoke-certificates") json(response, 200, { server_id: id, revoked_count: 2 });
      else if (verb === "enrolments") {
        const asked = { public_key_sha256: "ab".repeat(32), state: "pending", reason: "unknown hardware" };
        json(response, 200, { items: [{ ...asked, identity: { serial: "S1", hostname: "h1" } }] });
      } else json(response, 200, server);
    } else if (noun === "gpus" && method === "PATCH") {
      const { scheduling } = body as { scheduling: { schedulable: boolean; reason?: string } };
      json(response, 200, {
        id,
        schedulable: scheduling.schedulable,
        schedulable_reason: scheduling.reason ?? "",
      });
    } else if (noun === "tokens" || verb === "tokens") {
      const tokenId = noun === "tokens" ? id : url.pathname.split("/")[6];
      const token = { id: api.tokenId, name: noun === "tokens" ? "staff" : "of-a-tenant", role: "member" };
      if (method === "GET") page(response, url, [token]);
      else if (tokenId === api.tokenId) json(response, 200, { ...token, revoked_at: "2026-01-01T00:00:00Z" });
      else problem(response, 404, "token-not-found");
    } else if (noun === "allocations" && id === undefined && method === "POST") {
      const count = (body as { gpus?: { count?: number } }).gpus?.count ?? 0;
      if (count > 8) {
        problem(response, 422, "invalid-request", {
          errors: [{ location: "body", pointer: "/gpus/count", code: "too_big", message: "at most 8" }],
        });
        return;
      }
      const repeated = idempotent.get(key(request.headers["idempotency-key"]));
      const made = api.allocations.get(repeated ?? "") ?? {
        id: randomUUID(),
        gpus: [],
        name: (body as { name?: string }).name ?? "",
        state: "queued",
        message: "waiting for a free GPU",
        lease_seconds: 3600,
        request: body,
      };
      api.allocations.set(String(made["id"]), made);
      idempotent.set(key(request.headers["idempotency-key"]), String(made["id"]));
      if (api.loseAnswers > 0) {
        api.loseAnswers -= 1;
        request.socket.destroy();
        return;
      }
      json(response, 202, made);
    } else if (noun === "allocations" && id === undefined) {
      const states = url.searchParams.getAll("state");
      page(
        response,
        url,
        [...api.allocations.values()].filter(
          (row) => states.length === 0 || states.includes(String(row["state"])),
        ),
      );
    } else if (noun === "allocations" && id !== undefined) {
      allocation(response, method, id, verb, body);
    } else if (noun === "join-tokens" && method === "POST") {
      const made = { id: randomUUID(), uses: 0, ...(body as object) };
      joinTokens.push(made);
      json(response, 201, { ...made, token: "pbj_secret", ca_fingerprint: "ab12" });
    } else if (noun === "join-tokens") {
      page(response, url, joinTokens);
    } else if (noun === "events" && key(request.headers.accept).includes("text/event-stream")) {
      response.writeHead(200, { "content-type": "text/event-stream" });
      response.write("retry: 2000\n\n: hello\n\n");
      const types = url.searchParams.getAll("type");
      for (const event of api.events) {
        if (Number(event["seq"]) > Number(key(request.headers["last-event-id"]))) sendEvent(response, event);
      }
      streams.set(response, { types });
      response.on("close", () => streams.delete(response));
    } else if (noun === "events") {
      const after = Number(url.searchParams.get("after_seq") ?? 0);
      const types = url.searchParams.getAll("type");
      const matching = api.events.filter(
        (event) =>
          Number(event["seq"]) > after &&
          (types.length === 0 || types.some((type) => String(event["type"]).startsWith(type))),
      );
      page(response, url, url.searchParams.get("order") === "ascending" ? matching : matching.toReversed());
    } else if (noun === "garbled") {
      response.end("<html>not ours</html>");
    } else {
      problem(response, 404, "route-not-found");
    }
  }

  const server: Server = createServer((request, response) => {
    handle(request, response).catch((error: unknown) => {
      response.destroy(error instanceof Error ? error : undefined);
    });
  });
  server.listen(0, "127.0.0.1");
  await once(server, "listening");

  const api: FakeApi = {
    url: `http://127.0.0.1:${(server.address() as AddressInfo).port}`,
    token: "pba_secret-of-the-test",
    tokenId: randomUUID(),
    allocations: new Map(),
    servers: [],
    events: [],
    writes: [],
    failNext: 0,
    loseAnswers: 0,
    nextState: { state: "active", message: "" },
    pageItems: 200,
    cutStreams() {
      for (const response of streams.keys()) response.destroy();
    },
    publish(event) {
      api.events.push(event);
      for (const response of streams.keys()) sendEvent(response, event);
    },
    openStreams: () => streams.size,
    async close() {
      server.closeAllConnections();
      server.close();
      await once(server, "close");
    },
  };
  return api;
}
