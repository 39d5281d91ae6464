import { z } from "@hono/zod-openapi";
import { PlatformError } from "@palebluedot/shared/errors.ts";
import type { Context } from "hono";
import type { Logger } from "@palebluedot/shared/logger.ts";
import type { Permission, Principal } from "../identity/permissions.ts";
import { invalidText, isStorable, readJsonBody } from "./body.ts";
import { type FieldFault, fieldFaults } from "./problem.ts";

/** What a request gathers on its way: the one log line and the answer's headers come from it. */
export interface RequestState {
  readonly requestId: string;
  readonly remoteAddress: string;
  route: string;
  principal: Principal | undefined;
  errorCode: string | undefined;
  cause: unknown;
}

export interface HttpEnv {
  Variables: { state: RequestState; log: Logger };
}

type Shape = z.ZodObject;
type Out<S extends z.ZodType | undefined> = S extends z.ZodType ? z.output<S> : undefined;

export interface RequestOf<
  Params extends Shape | undefined,
  Query extends Shape | undefined,
  Body extends z.ZodType | undefined,
> {
  readonly params: Out<Params>;
  readonly query: Out<Query>;
  readonly body: Out<Body>;
  readonly principal: Principal;
  /** Aborts when the client went away or the server stops. */
  readonly signal: AbortSignal;
  readonly header: (name: string) => string | undefined;
}

/** A JSON answer, checked by the compiler against the route's schema. */
export interface JsonReply<Result extends z.ZodType | undefined> {
  readonly status?: number;
  readonly body: Result extends z.ZodType ? z.input<Result> : undefined;
  readonly headers?: Readonly<Record<string, string>>;
}

export interface RouteSpec<
  Params extends Shape | undefined = Shape | undefined,
  Query extends Shape | undefined = Shape | undefined,
  Body extends z.ZodType | undefined = z.ZodType | undefined,
  Result extends z.ZodType | undefined = z.ZodType | undefined,
> {
  readonly method: "get" | "post" | "patch" | "put" | "delete";
  /** As OpenAPI writes it: /api/v1/servers/{id} */
  readonly path: string;
  readonly operationId: string;
  readonly summary: string;
  readonly description?: string;
  readonly tag: string;
  /** The permission that the caller needs. */
  readonly access: Permission | "public";
  readonly params?: Params;
  readonly query?: Query;
  readonly headers?: Shape;
  readonly body?: Body;
  /** True: the body may be missing altogether; it is then validated as {}. */
  readonly bodyOptional?: boolean;
  /** Status of success; 200 when absent. */
  readonly status?: 200 | 201 | 202 | 204;
  /** JSON of the success; absent for 204 and for streams. */
  readonly result?: Result;
  /** Media types of an answer that is not (only) JSON. */
  readonly media?: readonly string[];
  /** Problem statuses beyond the usual ones, with what they mean here. */
  readonly problems?: Readonly<Partial<Record<400 | 404 | 409 | 422 | 503, string>>>;
  readonly handle: (
    request: RequestOf<Params, Query, Body>,
  ) => Promise<JsonReply<Result> | Response> | JsonReply<Result> | Response;
}

/** A route whose types were checked and then forgotten, so that routes fit in one list. */
export type Route = Omit<RouteSpec, "handle"> & {
  readonly handle: (
    request: RequestOf<undefined, undefined, undefined>,
  ) => Promise<JsonReply<z.ZodType> | Response> | JsonReply<z.ZodType> | Response;
};

export function defineRoute<
  Params extends Shape | undefined = undefined,
  Query extends Shape | undefined = undefined,
  Body extends z.ZodType | undefined = undefined,
  Result extends z.ZodType | undefined = undefined,
>(spec: RouteSpec<Params, Query, Body, Result>): Route {
  return spec as unknown as Route;
}

export const anonymous: Principal = {
  tokenId: "",
  tokenName: "",
  role: "member",
  tenantId: null,
  tenantName: null,
  permissions: new Set(),
  actor: "anonymous",
};

function refuse(faults: readonly FieldFault[], status: 400 | 422, what: string, hint: string): PlatformError {
  const first = faults[0];
  const where = first === undefined || first.pointer === "" ? "" : `${first.pointer}: `;
  const more = faults.length > 1 ? ` (and ${faults.length - 1} more)` : "";
  return new PlatformError({
    code: status === 422 ? "invalid-request" : "invalid-parameter",
    kind: "invalid",
    status,
    message: `${what}: ${where}${first?.message ?? "it does not fit the schema"}${more}`,
    hint,
    details: { errors: faults },
  });
}

function requireDecodable(search: string): void {
  try {
    decodeURIComponent(search);
  } catch {
    throw new PlatformError({
      code: "invalid-url-encoding",
      kind: "invalid",
      message: "the query string is not percent-encoded UTF-8",
      hint: "Encode each parameter, e.g. with encodeURIComponent or curl --data-urlencode -G.",
    });
  }
}

/** Parses everything that came from outside, once, by the route's schemas. */
export async function parseRequest(
  route: Route,
  c: Context<HttpEnv>,
  principal: Principal,
  signal: AbortSignal,
): Promise<RequestOf<undefined, undefined, undefined>> {
  let params: unknown;
  let query: unknown;
  let body: unknown;
  if (route.params !== undefined) {
    const parsed = route.params.safeParse(c.req.param());
    if (!parsed.success) {
      // An id that cannot exist is answered as one that does not exist.
      throw new PlatformError({
        code: `${route.tag}-not-found`,
        kind: "not-found",
        message: "there is nothing with this id",
        hint: "Ids are UUIDs, as the lists show them.",
      });
    }
    params = parsed.data;
  }
  requireDecodable(new URL(c.req.url).search);
  const given: Record<string, string | string[]> = Object.create(null) as Record<string, string | string[]>;
  for (const [name, values] of Object.entries(c.req.queries())) {
    if (values.some((value) => !isStorable(value))) throw invalidText();
    given[name] = values.length === 1 ? (values[0] ?? "") : values;
  }
  const parsedQuery = (route.query ?? z.strictObject({})).safeParse({ ...given });
  if (!parsedQuery.success) {
    throw refuse(
      fieldFaults(parsedQuery.error, "query"),
      400,
      "a query parameter is wrong",
      "See /docs for the parameters of this operation.",
    );
  }
  query = parsedQuery.data;
  if (route.body !== undefined) {
    const raw = await readJsonBody(c.req.raw);
    if (raw === undefined && route.bodyOptional !== true) {
      throw new PlatformError({
        code: "body-missing",
        kind: "invalid",
        message: "this operation needs a JSON body",
        hint: "Send Content-Type: application/json and a JSON object.",
      });
    }
    const parsed = route.body.safeParse(raw ?? {});
    if (!parsed.success) {
      throw refuse(
        fieldFaults(parsed.error, "body"),
        422,
        "the request is not valid",
        "Correct the fields in errors; /docs shows what this operation takes.",
      );
    }
    body = parsed.data;
  }
  return {
    params: params as undefined,
    query: query as undefined,
    body: body as undefined,
    principal,
    signal,
    header: (name) => c.req.header(name),
  };
}
