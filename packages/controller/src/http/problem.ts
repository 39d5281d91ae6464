import { z } from "@hono/zod-openapi";
import { type ErrorKind, isPlatformError, PlatformError } from "@palebluedot/shared/errors.ts";

/** RFC 9457 problem documents: the one place where an error becomes an HTTP answer. */

export const problemContentType = "application/problem+json";

export const fieldFaultSchema = z
  .object({
    location: z.enum(["body", "query", "header", "path"]),
    /** JSON pointer into the body, or the parameter's name. */
    pointer: z.string(),
    code: z.string(),
    message: z.string(),
  })
  .openapi("FieldFault");

export type FieldFault = z.infer<typeof fieldFaultSchema>;

export const problemSchema = z
  .looseObject({
    type: z.string().openapi({ example: "urn:palebluedot:problem:allocation-not-found" }),
    title: z.string(),
    status: z.number().int(),
    detail: z.string(),
    code: z.string().openapi({ description: "Stable, kebab-case: programs branch on this." }),
    hint: z.string().optional().openapi({ description: "What to do about it." }),
    instance: z.string().openapi({ description: "The request: urn:palebluedot:request:<request id>" }),
    request_id: z.string(),
    retryable: z.boolean(),
    errors: z.array(fieldFaultSchema).optional(),
  })
  .openapi("Problem");

export type Problem = z.infer<typeof problemSchema>;

const statusOfKind: Readonly<Record<ErrorKind, number>> = {
  invalid: 400,
  unauthenticated: 401,
  forbidden: 403,
  "not-found": 404,
  conflict: 409,
  "too-large": 413,
  exhausted: 429,
  unavailable: 503,
  internal: 500,
};

const titles: Readonly<Record<number, string>> = {
  400: "Bad request",
  401: "Not authenticated",
  403: "Not allowed",
  404: "Not found",
  405: "Method not allowed",
  406: "Not acceptable",
  409: "Conflict",
  413: "Too large",
  415: "Unsupported media type",
  422: "Invalid request",
  429: "Too many requests",
  500: "Internal error",
  503: "Not available",
};

/** What the caller may know of a thrown value: a bug of ours shows its request id, never its text. */
export function asPlatformError(thrown: unknown): PlatformError {
  if (isPlatformError(thrown)) return thrown;
  if (isDatabaseAway(thrown)) {
    return new PlatformError({
      code: "database-unavailable",
      kind: "unavailable",
      message: "the database does not answer",
      hint: "Try again in a moment; operators find the cause at /readyz.",
      cause: thrown,
    });
  }
  if (isTimeout(thrown)) {
    return new PlatformError({
      code: "query-too-slow",
      kind: "unavailable",
      message: "the database did not answer this query in time",
      hint: "Ask for less: name a server, an allocation or a range.",
      cause: thrown,
    });
  }
  return new PlatformError({
    code: "internal-error",
    kind: "internal",
    message: "the controller could not finish this request",
    hint: "Quote the request id to your operator; the controller's log has the cause.",
    cause: thrown,
  });
}

const awayCodes = new Set([
  "CONNECTION_CLOSED",
  "CONNECTION_ENDED",
  "CONNECTION_DESTROYED",
  "CONNECT_TIMEOUT",
  "ECONNREFUSED",
  "ECONNRESET",
  "ENOENT",
  "EPIPE",
  // PostgreSQL: shutting down, crashed, starting up, too many connections
  "57P01",
  "57P02",
  "57P03",
  "53300",
]);

/** PostgreSQL gave the statement up at its timeout. */
const isTimeout = (thrown: unknown): boolean =>
  thrown instanceof Error && "code" in thrown && thrown.code === "57014";

function isDatabaseAway(thrown: unknown): boolean {
  if (!(thrown instanceof Error) || !("code" in thrown) || typeof thrown.code !== "string") return false;
  // ENOENT counts only for a socket: a missing file is a bug of ours.
  if (thrown.code === "ENOENT") return "syscall" in thrown && thrown.syscall === "connect";
  return awayCodes.has(thrown.code);
}

/** HTTP status of an error; internal (500) for kinds of a newer copy of the class. */
export function statusOf(error: PlatformError): number {
  return error.status ?? statusOfKind[error.kind] ?? 500;
}

export function problemOf(error: PlatformError, requestId: string): Problem {
  const status = statusOf(error);
  const problem = {
    type: `urn:palebluedot:problem:${error.code}`,
    title: titles[status] ?? "Error",
    status,
    detail: error.message,
    code: error.code,
    ...(error.hint === undefined ? {} : { hint: error.hint }),
    instance: `urn:palebluedot:request:${requestId}`,
    request_id: requestId,
    retryable: error.retryable,
  };
  // Twice: what people read first stands first, and details never replace it.
  return { ...problem, ...error.details, ...problem };
}

export function problemResponse(
  error: PlatformError,
  requestId: string,
  headers: Readonly<Record<string, string>> = {},
): Response {
  const problem = problemOf(error, requestId);
  const retryAfter = error.details?.["retry_after_seconds"];
  return new Response(JSON.stringify(problem), {
    status: problem.status,
    headers: {
      "content-type": problemContentType,
      ...(problem.status === 401 ? { "www-authenticate": 'Bearer realm="palebluedot"' } : {}),
      ...(typeof retryAfter === "number" ? { "retry-after": String(Math.ceil(retryAfter)) } : {}),
      ...headers,
    },
  });
}

/** The schema's complaints as field faults, unknown fields by name. At most `maxFaults`. */
export function fieldFaults(
  error: z.ZodError,
  location: FieldFault["location"],
  maxFaults = 32,
): FieldFault[] {
  const faults: FieldFault[] = [];
  for (const issue of error.issues) {
    const base = location === "body" ? pointerOf(issue.path) : issue.path.join(".");
    if (issue.code === "unrecognized_keys") {
      for (const key of issue.keys) {
        faults.push({
          location,
          pointer: location === "body" ? pointerOf([...issue.path, key]) : printable(key),
          code: "unknown-field",
          message: `there is no ${location === "body" ? "field" : "parameter"} ${JSON.stringify(printable(key))} here`,
        });
      }
    } else {
      faults.push({
        location,
        pointer: base,
        code: issue.code.replaceAll("_", "-"),
        message: issue.message,
      });
    }
  }
  return faults.slice(0, maxFaults);
}

function pointerOf(path: readonly PropertyKey[]): string {
  return path
    .map((part) => `/${printable(String(part)).replaceAll("~", "~0").replaceAll("/", "~1")}`)
    .join("");
}

/** Names come from the caller: cut, and without what a terminal would act on. */
function printable(name: string): string {
  const clean = name.toWellFormed().replaceAll(/\p{Cc}/gu, "\uFFFD");
  return clean.length > 100 ? `${clean.slice(0, 100)}…` : clean;
}
