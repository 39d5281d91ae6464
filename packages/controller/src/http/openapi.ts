import { OpenAPIHono, type RouteConfig, z } from "@hono/zod-openapi";
import { problemContentType, problemSchema } from "./problem.ts";
import type { Route } from "./route.ts";

const successText: Readonly<Record<number, string>> = {
  200: "Done",
  201: "Created",
  202: "Accepted",
  204: "Done, nothing to say",
};

const problemText: Readonly<Record<number, string>> = {
  400: "The request cannot be read, or a parameter is wrong",
  401: "No valid token",
  403: "The token may not do this",
  404: "There is nothing with this id, or it belongs to another tenant",
  413: "The body is too large",
  415: "The body is not JSON",
  422: "The body does not fit the schema",
  429: "Too many requests; see Retry-After",
  500: "A bug of the controller",
  503: "A part that the controller needs does not answer",
};

function problemStatuses(route: Route): ReadonlyMap<number, string> {
  const statuses = new Map<number, string>();
  const add = (status: number): void => {
    statuses.set(status, problemText[status] ?? "Problem");
  };
  add(400);
  if (route.access !== "public") for (const status of [401, 403, 429]) add(status);
  if (route.params !== undefined) add(404);
  if (route.body !== undefined) for (const status of [413, 415, 422]) add(status);
  add(500);
  add(503);
  for (const [status, text] of Object.entries(route.problems ?? {})) statuses.set(Number(status), text);
  return statuses;
}

function responsesOf(route: Route): RouteConfig["responses"] {
  const status = route.status ?? 200;
  const content: Record<string, { schema: z.ZodType }> = {};
  if (route.result !== undefined) content["application/json"] = { schema: route.result };
  for (const media of route.media ?? []) content[media] = { schema: z.string() };
  const responses: RouteConfig["responses"] = {
    [status]: {
      description: successText[status] ?? "Done",
      ...(Object.keys(content).length === 0 ? {} : { content }),
    },
  };
  for (const [code, description] of problemStatuses(route)) {
    // A probe answers 503 with its own document.
    if (code === status) continue;
    responses[code] = { description, content: { [problemContentType]: { schema: problemSchema } } };
  }
  return responses;
}

/** The OpenAPI 3.1 document of these routes: made from the same objects that serve them. */
export function openApiDocument(routes: readonly Route[], version: string): object {
  const holder = new OpenAPIHono();
  holder.openAPIRegistry.registerComponent("securitySchemes", "token", {
    type: "http",
    scheme: "bearer",
    description: "An API token: pba_… (admin), pbo_… (operator), pbm_… (metrics) or pbt_… (tenant).",
  });
  for (const route of routes) {
    holder.openAPIRegistry.registerPath({
      method: route.method,
      path: route.path,
      operationId: route.operationId,
      summary: route.summary,
      description: [
        route.description,
        route.access === "public" ? undefined : `Needs the permission \`${route.access}\`.`,
      ]
        .filter((text) => text !== undefined)
        .join("\n\n"),
      tags: [route.tag],
      security: route.access === "public" ? [] : [{ token: [] }],
      request: {
        ...(route.params === undefined ? {} : { params: route.params }),
        ...(route.query === undefined ? {} : { query: route.query }),
        ...(route.headers === undefined ? {} : { headers: route.headers }),
        ...(route.body === undefined
          ? {}
          : {
              body: {
                required: route.bodyOptional !== true,
                content: { "application/json": { schema: route.body } },
              },
            }),
      },
      responses: responsesOf(route),
    });
  }
  return holder.getOpenAPI31Document({
    openapi: "3.1.0",
    info: {
      title: "Palebluedot",
      version,
      description:
        "GPU infrastructure as a service. Errors are problem documents (RFC 9457) with a stable code and a hint; lists are pages of {items, next_cursor}; times are RFC 3339 in UTC; quantities carry their unit in the name.",
      license: { name: "Apache-2.0", url: "https://www.apache.org/licenses/LICENSE-2.0" },
    },
    servers: [{ url: "/" }],
  });
}
