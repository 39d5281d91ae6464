import { z } from "@hono/zod-openapi";
import { prometheusTargets } from "../servers/prometheus-targets.ts";
import type { HttpContext } from "./context.ts";
import { docsPage } from "./docs-page.ts";
import { openApiDocument } from "./openapi.ts";
import { defineRoute, type Route } from "./route.ts";

const tag = "system";

const readySchema = z
  .object({
    ready: z.boolean(),
    checks: z.array(z.object({ name: z.string(), ready: z.boolean(), message: z.string() })),
  })
  .openapi("Readiness");

/** Probes, metrics, service discovery and the API's own description. `routes` are all routes, also these. */
export function systemRoutes(context: HttpContext, routes: () => readonly Route[]): Route[] {
  let document: object | undefined;
  const describe = (): object => (document ??= openApiDocument(routes(), context.version));

  const health = (path: string, operationId: string): Route =>
    defineRoute({
      method: "get",
      path,
      operationId,
      summary: "Is the process alive?",
      tag,
      access: "public",
      result: z.object({ status: z.literal("ok"), version: z.string() }),
      handle: () => ({ body: { status: "ok" as const, version: context.version } }),
    });

  const ready = (path: string, operationId: string): Route =>
    defineRoute({
      method: "get",
      path,
      operationId,
      summary: "Can it serve? 503 while a part it needs is not there",
      tag,
      access: "public",
      result: readySchema,
      problems: { 503: "Not ready: the document names the part (application/json)" },
      async handle() {
        const checks = [...(await context.readiness())];
        const isReady = checks.every((check) => check.ready);
        return { status: isReady ? 200 : 503, body: { ready: isReady, checks } };
      },
    });

  return [
    health("/healthz", "getHealth"),
    health("/api/v1/healthz", "getApiHealth"),
    ready("/readyz", "getReadiness"),
    ready("/api/v1/readyz", "getApiReadiness"),
    defineRoute({
      method: "get",
      path: "/metrics",
      operationId: "getMetrics",
      summary: "The controller's own metrics, for Prometheus",
      description: "Per-GPU series are served by the agents; see /api/v1/prometheus/targets.",
      tag,
      access: "metrics:read",
      media: ["text/plain"],
      async handle() {
        return new Response(await context.deps.metrics.metrics(), {
          headers: { "content-type": context.deps.metrics.contentType },
        });
      },
    }),
    defineRoute({
      method: "get",
      path: "/api/v1/prometheus/targets",
      operationId: "listPrometheusTargets",
      summary: "Agents' metrics endpoints, as Prometheus' HTTP service discovery reads them",
      tag,
      access: "metrics:read",
      result: z.array(z.object({ targets: z.array(z.string()), labels: z.record(z.string(), z.string()) })),
      handle: async () => ({ body: await prometheusTargets(context.deps.sql) }),
    }),
    defineRoute({
      method: "get",
      path: "/openapi.json",
      operationId: "getOpenApi",
      summary: "This API as an OpenAPI 3.1 document",
      tag,
      access: "public",
      result: z.looseObject({}),
      handle: () => ({
        body: describe() as Record<string, unknown>,
        headers: { "cache-control": "max-age=60" },
      }),
    }),
    defineRoute({
      method: "get",
      path: "/docs",
      operationId: "getDocs",
      summary: "This API for people",
      tag,
      access: "public",
      media: ["text/html"],
      handle: () => docsPage(describe()),
    }),
  ];
}
