import { randomUUID } from "node:crypto";
import type { HttpBindings } from "@hono/node-server";
import { PlatformError } from "@palebluedot/shared/errors.ts";
import type { Logger } from "@palebluedot/shared/logger.ts";
import { type Context, Hono } from "hono";
import { Histogram, type Registry } from "prom-client";
import type { IdentityService } from "../identity/identity.ts";
import type { Principal } from "../identity/permissions.ts";
import { asPlatformError, problemResponse, statusOf } from "./problem.ts";
import { anonymous, type HttpEnv, parseRequest, type RequestState, type Route } from "./route.ts";

export interface HttpAppOptions {
  readonly routes: readonly Route[];
  readonly identity: Pick<IdentityService, "authenticate">;
  readonly log: Logger;
  readonly metrics: Registry;
  /** Aborts when the server stops: ends streams. */
  readonly stopping: AbortSignal;
  /** Checks every answer against its schema and fails loudly; for tests, as it costs time. */
  readonly checkResponses?: boolean;
}

const sanePattern = /^[A-Za-z0-9._:/+=-]{1,128}$/;

const securityHeaders: Readonly<Record<string, string>> = {
  "x-content-type-options": "nosniff",
  "x-frame-options": "DENY",
  "referrer-policy": "no-referrer",
  "cross-origin-opener-policy": "same-origin",
  "cross-origin-resource-policy": "same-origin",
};

/** Answers are data: nothing in them may load or run anything. Pages bring their own policy. */
const dataContentPolicy = "default-src 'none'; frame-ancestors 'none'";

function matcherOf(path: string): RegExp {
  const escaped = path.replaceAll(/[.*+?^$()|[\]\\]/g, "\\$&").replaceAll(/\{[a-z_]+\}/g, "[^/]+");
  return new RegExp(`^${escaped}$`);
}

function bearerToken(c: Context<HttpEnv>): string {
  const header = c.req.header("authorization");
  const match = header === undefined ? null : /^Bearer +(\S+) *$/i.exec(header);
  if (match?.[1] === undefined) {
    throw new PlatformError({
      code: "unauthenticated",
      kind: "unauthenticated",
      message:
        header === undefined
          ? "the request carries no token"
          : "the Authorization header is not a bearer token",
      hint: "Send Authorization: Bearer <token>.",
    });
  }
  return match[1];
}

/** The whole REST API as one function from request to answer; server.ts puts it on a port. */
export function createHttpApp(options: HttpAppOptions): Hono<HttpEnv> {
  const { log } = options;
  const app = new Hono<HttpEnv>({ strict: true });
  const duration = new Histogram({
    name: "palebluedot_http_request_duration_seconds",
    help: "Time from the request's head to the answer's head, by route template.",
    labelNames: ["method", "route", "status"],
    buckets: [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5],
    registers: [options.metrics],
  });
  const matchers = options.routes.map((route) => ({
    pattern: matcherOf(route.path),
    method: route.method.toUpperCase(),
  }));

  app.use(async (c, next) => {
    const started = performance.now();
    const given = c.req.header("x-request-id");
    // Present when the app runs behind a real server; not in a test that calls it directly.
    const bindings = c.env as Partial<HttpBindings> | undefined;
    const state: RequestState = {
      requestId: given !== undefined && sanePattern.test(given) ? given : randomUUID(),
      remoteAddress: bindings?.incoming?.socket.remoteAddress ?? "unknown",
      route: "unmatched",
      principal: undefined,
      errorCode: undefined,
      cause: undefined,
    };
    c.set("state", state);
    c.set("log", log);
    await next();
    for (const [name, value] of Object.entries(securityHeaders)) c.res.headers.set(name, value);
    if (!c.res.headers.has("content-security-policy")) {
      c.res.headers.set("content-security-policy", dataContentPolicy);
    }
    if (!c.res.headers.has("cache-control")) c.res.headers.set("cache-control", "no-store");
    c.res.headers.set("x-request-id", state.requestId);
    const durationMs = performance.now() - started;
    duration.observe(
      { method: knownMethod(c.req.method), route: state.route, status: String(c.res.status) },
      durationMs / 1000,
    );
    const line = {
      event: "http-request",
      request_id: state.requestId,
      method: c.req.method,
      route: state.route,
      // Paths of ours hold ids only; others are the caller's text and stay out.
      path: state.route === "unmatched" ? undefined : c.req.path,
      status: c.res.status,
      duration_ms: Math.round(durationMs * 10) / 10,
      remote_address: state.remoteAddress,
      token_id: state.principal?.tokenId,
      tenant_id: state.principal?.tenantId ?? undefined,
      code: state.errorCode,
      error: state.cause,
    };
    if (c.res.status === 503) log.warn(line, "request");
    else if (c.res.status >= 500) log.error(line, "request");
    else if (state.principal === undefined && c.res.status < 400) log.debug(line, "request");
    else log.info(line, "request");
  });

  app.onError((thrown, c) => {
    const error = asPlatformError(thrown);
    const state = c.get("state");
    state.errorCode = error.code;
    if (statusOf(error) >= 500) state.cause = describe(error.cause ?? error);
    // What was not read of a refused body must not be taken for the next request.
    const close: Record<string, string> = statusOf(error) === 413 ? { connection: "close" } : {};
    return problemResponse(error, state.requestId, close);
  });

  app.notFound((c) => {
    const state = c.get("state");
    const path = c.req.path;
    const methods = matchers.filter((entry) => entry.pattern.test(path)).map((entry) => entry.method);
    if (methods.length === 0) {
      state.errorCode = "path-not-found";
      return problemResponse(
        new PlatformError({
          code: "path-not-found",
          kind: "not-found",
          message: "there is nothing at this path",
          hint: "GET /openapi.json lists every path; the API is below /api/v1.",
        }),
        state.requestId,
      );
    }
    const allow = [...new Set(methods.includes("GET") ? [...methods, "HEAD"] : methods)].sort().join(", ");
    state.errorCode = "method-not-allowed";
    return problemResponse(
      new PlatformError({
        code: "method-not-allowed",
        kind: "invalid",
        status: 405,
        message: `this path does not take ${knownMethod(c.req.method)}`,
        hint: `It takes ${allow}.`,
      }),
      state.requestId,
      { allow },
    );
  });

  for (const route of options.routes) {
    const path = route.path.replaceAll(/\{([a-z_]+)\}/g, ":$1");
    app.on(route.method.toUpperCase(), path, async (c) => {
      const state = c.get("state");
      state.route = route.path;
      const principal = await authorise(route, c, state);
      const signal = AbortSignal.any([c.req.raw.signal, options.stopping]);
      const request = await parseRequest(route, c, principal, signal);
      const reply = await route.handle(request);
      if (reply instanceof Response) return reply;
      const status = reply.status ?? route.status ?? 200;
      if (status === 204 || reply.body === undefined) {
        return new Response(null, { status, headers: { ...reply.headers } });
      }
      if (options.checkResponses === true && route.result !== undefined && status < 300) {
        route.result.parse(reply.body);
      }
      return new Response(JSON.stringify(reply.body), {
        status,
        headers: { "content-type": "application/json", ...reply.headers },
      });
    });
  }

  async function authorise(route: Route, c: Context<HttpEnv>, state: RequestState): Promise<Principal> {
    if (route.access === "public") return anonymous;
    const principal = await options.identity.authenticate(bearerToken(c), state.remoteAddress);
    state.principal = principal;
    if (!principal.permissions.has(route.access)) {
      throw new PlatformError({
        code: "permission-missing",
        kind: "forbidden",
        message: `this token's role (${principal.role}) lacks the permission ${route.access}`,
        hint: "Use a token of an operator or admin, or ask one.",
      });
    }
    return principal;
  }

  return app;
}

/** Methods are the caller's text; a metric's label takes only the known ones. */
function knownMethod(method: string): string {
  return ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"].includes(method) ? method : "other";
}

function describe(cause: unknown): string {
  const text = cause instanceof Error ? (cause.stack ?? cause.message) : String(cause);
  return text.slice(0, 4000);
}
