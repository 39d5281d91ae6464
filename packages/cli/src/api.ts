import { request as requestHttp, type IncomingMessage } from "node:http";
import { request as requestHttps } from "node:https";
import { errorMessage, PlatformError, type ErrorKind } from "@palebluedot/shared/errors.ts";
import { z } from "zod";
import type { Context } from "./contexts.ts";

export type Query = Readonly<Record<string, string | number | boolean | readonly string[] | undefined>>;

export interface RequestOptions {
  readonly query?: Query | undefined;
  readonly body?: unknown;
  readonly headers?: Readonly<Record<string, string>>;
  readonly signal?: AbortSignal | undefined;
}

export type Method = "GET" | "POST" | "PATCH" | "DELETE";

export interface ApiClient {
  /** JSON answer through the schema; undefined body (204) is given to it as null. */
  call<Schema extends z.ZodType>(
    method: Method,
    path: string,
    schema: Schema,
    options?: RequestOptions,
  ): Promise<z.output<Schema>>;
  /** All pages of a list up to `limit` items. */
  list<Schema extends z.ZodType>(
    path: string,
    item: Schema,
    options: { readonly query?: Query; readonly limit: number },
  ): Promise<z.output<Schema>[]>;
  /** The body of a success as it arrives. No limit on its duration; idle connections are the server's to end. */
  stream(
    path: string,
    options: RequestOptions & { readonly accept: string },
  ): Promise<AsyncIterable<Uint8Array>>;
}

export interface ApiOptions {
  /** For an answer to begin and to end, except streams. Milliseconds. */
  readonly timeoutMs?: number;
  readonly sleep?: (ms: number) => Promise<void>;
}

const pageItems = 200;
const maxAnswerBytes = 64 * 1024 * 1024;
/** First try included. */
const attempts = 3;
const retryDelayMs = 250;

const problemSchema = z.looseObject({
  code: z.string(),
  detail: z.string().optional(),
  title: z.string().optional(),
  hint: z.string().optional(),
  request_id: z.string().optional(),
  errors: z.array(z.looseObject({ pointer: z.string().optional(), message: z.string() })).optional(),
});

function kindOfStatus(status: number): ErrorKind {
  if (status === 401) return "unauthenticated";
  if (status === 403) return "forbidden";
  if (status === 404) return "not-found";
  if (status === 409) return "conflict";
  if (status === 413) return "too-large";
  if (status === 429) return "exhausted";
  if (status === 502 || status === 503 || status === 504) return "unavailable";
  return status >= 400 && status < 500 ? "invalid" : "internal";
}

/** An error answer as the error it tells of. */
export function problemError(status: number, text: string): PlatformError {
  let value: unknown;
  try {
    value = JSON.parse(text);
  } catch {
    value = undefined;
  }
  const problem = problemSchema.safeParse(value);
  if (!problem.success) {
    return new PlatformError({
      code: `http-${status}`,
      kind: kindOfStatus(status),
      status,
      message: `the server answered ${status} without saying why`,
      hint: "Is this the address of a Palebluedot controller?",
    });
  }
  const { code, detail, title, hint, errors, request_id: requestId } = problem.data;
  // The detail may name the fields already.
  const faults = (errors ?? [])
    .filter((fault) => detail?.includes(fault.message) !== true)
    .map((fault) => `${fault.pointer ?? ""}: ${fault.message}`);
  return new PlatformError({
    code,
    kind: kindOfStatus(status),
    status,
    message: [detail ?? title ?? code, ...faults].join("\n  "),
    ...(hint === undefined ? {} : { hint }),
    details: { request_id: requestId },
  });
}

/** Idempotent by HTTP, or because a key makes it so. */
function mayRepeat(method: Method, options: RequestOptions): boolean {
  return method === "GET" || method === "DELETE" || options.headers?.["idempotency-key"] !== undefined;
}

async function readText(answer: IncomingMessage): Promise<string> {
  const chunks: Buffer[] = [];
  let bytes = 0;
  for await (const chunk of answer as AsyncIterable<Buffer>) {
    bytes += chunk.length;
    if (bytes > maxAnswerBytes) {
      throw new PlatformError({
        code: "answer-too-large",
        kind: "internal",
        message: `the answer is larger than ${maxAnswerBytes} bytes`,
        hint: "Narrow the list with filters or --limit.",
      });
    }
    chunks.push(chunk);
  }
  return Buffer.concat(chunks).toString("utf8");
}

export function createApiClient(context: Context, options: ApiOptions = {}): ApiClient {
  const timeoutMs = options.timeoutMs ?? 30_000;
  const sleep = options.sleep ?? ((ms) => new Promise((resolve) => setTimeout(resolve, ms)));

  function urlOf(path: string, query: Query = {}): URL {
    const url = new URL(context.url);
    url.pathname = `${url.pathname.replace(/\/$/, "")}/api/v1/${path}`;
    for (const [name, value] of Object.entries(query)) {
      if (value === undefined) continue;
      for (const one of Array.isArray(value) ? (value as readonly string[]) : [value]) {
        url.searchParams.append(name, String(one));
      }
    }
    return url;
  }

  function send(
    method: Method,
    path: string,
    request: RequestOptions & { readonly accept: string; readonly signal: AbortSignal },
  ): Promise<IncomingMessage> {
    const url = urlOf(path, request.query);
    const body = request.body === undefined ? undefined : Buffer.from(JSON.stringify(request.body));
    return new Promise((resolve, reject) => {
      const sent = (url.protocol === "https:" ? requestHttps : requestHttp)(url, {
        method,
        signal: request.signal,
        headers: {
          accept: request.accept,
          authorization: `Bearer ${context.token}`,
          "user-agent": "pbd",
          ...(body === undefined
            ? {}
            : { "content-type": "application/json", "content-length": body.length }),
          ...request.headers,
        },
        ...(context.ca_pem === undefined ? {} : { ca: context.ca_pem }),
      });
      sent.on("response", resolve);
      sent.on("error", reject);
      sent.end(body);
    });
  }

  function unreachable(cause: unknown): PlatformError {
    const code = cause instanceof Error && "code" in cause ? String(cause.code) : "";
    const timedOut = cause instanceof Error && (cause.name === "TimeoutError" || code === "ABORT_ERR");
    const certificate = /CERT|SELF_SIGNED|ALTNAME/.test(code);
    return new PlatformError({
      code: certificate ? "certificate-not-trusted" : timedOut ? "timed-out" : "controller-unreachable",
      kind: "unavailable",
      message: timedOut
        ? `${context.url} did not answer within ${timeoutMs / 1000} s`
        : `${context.url}: ${errorMessage(cause) || code}`,
      hint: certificate
        ? "Log in with --ca-file to trust the authority of this controller."
        : "Is the controller running, and is this its address? pbd context list shows it.",
      retryable: !certificate,
      cause,
    });
  }

  async function once(method: Method, path: string, request: RequestOptions): Promise<unknown> {
    const timeout = AbortSignal.timeout(timeoutMs);
    const signal = request.signal === undefined ? timeout : AbortSignal.any([timeout, request.signal]);
    let status: number;
    let body: string;
    try {
      const answer = await send(method, path, { ...request, accept: "application/json", signal });
      status = answer.statusCode ?? 0;
      body = await readText(answer);
    } catch (cause) {
      if (request.signal?.aborted === true || cause instanceof PlatformError) throw cause;
      throw unreachable(cause);
    }
    if (status < 200 || status > 299) throw problemError(status, body);
    if (body === "") return null;
    try {
      return JSON.parse(body);
    } catch {
      throw problemError(status, body);
    }
  }

  async function call<Schema extends z.ZodType>(
    method: Method,
    path: string,
    schema: Schema,
    request: RequestOptions = {},
  ): Promise<z.output<Schema>> {
    for (let attempt = 1; ; attempt += 1) {
      try {
        const parsed = schema.safeParse(await once(method, path, request));
        if (parsed.success) return parsed.data;
        throw new PlatformError({
          code: "answer-not-understood",
          kind: "internal",
          message: `the answer to ${method} ${path} does not have the expected form: ${z.prettifyError(parsed.error)}`,
          hint: "Are pbd and the controller of about the same version?",
        });
      } catch (error) {
        const again =
          error instanceof PlatformError &&
          error.kind === "unavailable" &&
          error.retryable &&
          mayRepeat(method, request);
        if (!again || attempt === attempts) throw error;
        await sleep(retryDelayMs * 2 ** attempt * (0.5 + Math.random() / 2));
      }
    }
  }

  return {
    call,
    async list(path, item, listOptions) {
      const page = z.looseObject({ items: z.array(item), next_cursor: z.string().nullish() });
      const items: z.output<typeof item>[] = [];
      let cursor: string | undefined;
      do {
        const limit = Math.min(pageItems, listOptions.limit - items.length);
        const answer = await call("GET", path, page, { query: { ...listOptions.query, limit, cursor } });
        items.push(...(answer.items as z.output<typeof item>[]));
        cursor = answer.next_cursor ?? undefined;
      } while (cursor !== undefined && items.length < listOptions.limit);
      return items.slice(0, listOptions.limit);
    },
    async stream(path, request) {
      // Only the beginning has a deadline: logs may be silent for days.
      const beginning = new AbortController();
      const timer = setTimeout(
        () => beginning.abort(new DOMException("timed out", "TimeoutError")),
        timeoutMs,
      );
      const signal =
        request.signal === undefined ? beginning.signal : AbortSignal.any([beginning.signal, request.signal]);
      try {
        const answer = await send("GET", path, { ...request, signal });
        const status = answer.statusCode ?? 0;
        if (status < 200 || status > 299) throw problemError(status, await readText(answer));
        return answer as AsyncIterable<Uint8Array>;
      } catch (cause) {
        if (cause instanceof PlatformError || request.signal?.aborted === true) throw cause;
        throw unreachable(cause);
      } finally {
        clearTimeout(timer);
      }
    },
  };
}
