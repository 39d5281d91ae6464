/** The little of HTTP the simulated engine needs: routes, JSON bodies, errors in the engine's form. */
import type { IncomingMessage, ServerResponse } from "node:http";
import { PlatformError } from "@palebluedot/shared/errors.ts";

const maximumBodyBytes = 4 << 20;

/** An answer the engine gives as `{"message": ...}` with this status. */
export class EngineError extends PlatformError {
  constructor(status: number, message: string) {
    super({
      code: "simulated-engine-refused",
      kind: status === 404 ? "not-found" : status === 409 ? "conflict" : "invalid",
      message,
      status,
      retryable: false,
    });
  }
}

export interface Call {
  readonly request: IncomingMessage;
  readonly response: ServerResponse;
  readonly parameters: Readonly<Record<string, string>>;
  readonly query: URLSearchParams;
}

export interface Route {
  readonly method: string;
  readonly pattern: RegExp;
  readonly handle: (call: Call) => Promise<void> | void;
}

/** `path` may hold `:name` (one segment) and `:name*` (several, for image names). */
export function route(method: string, path: string, handle: Route["handle"]): Route {
  const pattern = path.replaceAll(/:(\w+)(\*?)/g, (_, name: string, many: string) =>
    many ? `(?<${name}>.+)` : `(?<${name}>[^/]+)`,
  );
  // The version prefix is optional, as in the real engine.
  return { method, pattern: new RegExp(`^(?:/v1\\.\\d+)?${pattern}$`), handle };
}

export function sendJson(response: ServerResponse, status: number, body: unknown): void {
  const text = `${JSON.stringify(body)}\n`;
  response.writeHead(status, {
    "Content-Type": "application/json",
    "Content-Length": Buffer.byteLength(text),
  });
  response.end(text);
}

export function sendEmpty(response: ServerResponse, status: number): void {
  response.writeHead(status);
  response.end();
}

/** The parsed body; an empty one is `{}`. Throws 400 and 413. */
export async function readJsonBody(request: IncomingMessage): Promise<unknown> {
  const chunks: Buffer[] = [];
  let size = 0;
  for await (const chunk of request as AsyncIterable<Buffer>) {
    size += chunk.length;
    if (size > maximumBodyBytes) throw new EngineError(413, "request body too large");
    chunks.push(chunk);
  }
  const text = Buffer.concat(chunks).toString("utf8");
  if (text.trim() === "") return {};
  try {
    return JSON.parse(text) as unknown;
  } catch (error) {
    throw new EngineError(400, `invalid JSON: ${error instanceof Error ? error.message : "unreadable"}`);
  }
}

/** The engine's flags are "1", "true" or absent. */
export function flag(query: URLSearchParams, name: string): boolean {
  const value = query.get(name);
  return value === "1" || value === "true" || value === "True";
}

/** The `filters` parameter: `{"label":["a=b"]}`, or the older form `{"label":{"a=b":true}}`. */
export function filters(query: URLSearchParams): Readonly<Record<string, readonly string[]>> {
  const text = query.get("filters");
  if (text === null || text === "") return {};
  let parsed: unknown;
  try {
    parsed = JSON.parse(text);
  } catch {
    throw new EngineError(400, "invalid filters");
  }
  if (typeof parsed !== "object" || parsed === null) throw new EngineError(400, "invalid filters");
  return Object.fromEntries(
    Object.entries(parsed).map(([name, value]) => [
      name,
      Array.isArray(value) ? value.map(String) : Object.keys((value ?? {}) as object),
    ]),
  );
}

/** Whether labels satisfy `key` and `key=value` conditions. */
export function matchesLabels(
  labels: Readonly<Record<string, string>>,
  conditions: readonly string[],
): boolean {
  return conditions.every((condition) => {
    const equals = condition.indexOf("=");
    return equals < 0
      ? condition in labels
      : labels[condition.slice(0, equals)] === condition.slice(equals + 1);
  });
}
