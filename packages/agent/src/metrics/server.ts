import { createHash, timingSafeEqual } from "node:crypto";
import { readFile } from "node:fs/promises";
import {
  createServer,
  type IncomingMessage,
  type RequestListener,
  type Server,
  type ServerResponse,
} from "node:http";
import { createServer as createTlsServer } from "node:https";
import type { AddressInfo } from "node:net";
import { errorMessage, PlatformError } from "@palebluedot/shared/errors.ts";
import type { Logger } from "@palebluedot/shared/logger.ts";
import type { AgentMetrics } from "./metrics.ts";

interface Health {
  readonly ok: boolean;
  /** For people and `doctor`; never secrets. */
  readonly details: Readonly<Record<string, unknown>>;
}

export interface MetricsServerOptions {
  readonly host: string;
  /** 0: any free port. */
  readonly port: number;
  readonly metrics: AgentMetrics;
  readonly health: () => Health;
  readonly log: Logger;
  /** PEM files; both or none. */
  readonly tls?: { readonly certificateFile: string; readonly keyFile: string } | undefined;
  /** A scrape must present the file's content as bearer token. Read again at most once a minute, so that it can be rotated. */
  readonly tokenFile?: string | undefined;
}

export interface MetricsServer {
  readonly port: number;
  stop(): Promise<void>;
}

const maxConnections = 32;
const tokenCacheMs = 60_000;

/**
 * Serves /metrics and /healthz. `/healthz` needs no token: it tells no more than that the agent lives.
 * Throws PlatformError `metrics-listen-failed` or `metrics-tls-unreadable`.
 */
export async function startMetricsServer(options: MetricsServerOptions): Promise<MetricsServer> {
  const authorised = tokenCheck(options.tokenFile);
  const onRequest: RequestListener = (request, response) => {
    answer(request, response, options, authorised).catch((error: unknown) => {
      options.log.error({ error: errorMessage(error) }, "a scrape failed");
      send(response, 500, "text/plain", "internal error\n");
    });
  };
  const server = await createHttpServer(options, onRequest);
  server.maxConnections = maxConnections;
  server.requestTimeout = 10_000;
  server.headersTimeout = 5000;
  server.keepAliveTimeout = 30_000;
  await new Promise<void>((resolve, reject) => {
    server.once("error", (error) => {
      reject(
        new PlatformError({
          code: "metrics-listen-failed",
          kind: "unavailable",
          message: `cannot serve metrics on ${options.host}:${String(options.port)}: ${error.message}`,
          hint: "choose another PALEBLUEDOT_METRICS_PORT, or stop what holds it",
          cause: error,
        }),
      );
    });
    server.listen(options.port, options.host, resolve);
  });
  server.on("error", (error) => {
    options.log.warn({ error: error.message }, "the metrics listener");
  });
  // The metrics listener alone is no reason to stay alive.
  server.unref();
  return {
    port: (server.address() as AddressInfo).port,
    stop: () =>
      new Promise((resolve) => {
        server.close(() => {
          resolve();
        });
        server.closeAllConnections();
      }),
  };
}

async function createHttpServer(options: MetricsServerOptions, onRequest: RequestListener): Promise<Server> {
  if (options.tls === undefined) return createServer({ maxHeaderSize: 8192 }, onRequest);
  try {
    const [cert, key] = await Promise.all([
      readFile(options.tls.certificateFile),
      readFile(options.tls.keyFile),
    ]);
    return createTlsServer({ cert, key, minVersion: "TLSv1.2", maxHeaderSize: 8192 }, onRequest);
  } catch (error) {
    throw new PlatformError({
      code: "metrics-tls-unreadable",
      kind: "invalid",
      message: `the metrics listener's certificate or key cannot be used: ${errorMessage(error)}`,
      cause: error,
    });
  }
}

async function answer(
  request: IncomingMessage,
  response: ServerResponse,
  options: MetricsServerOptions,
  authorised: (header: string | undefined) => Promise<boolean>,
): Promise<void> {
  if (request.method !== "GET" && request.method !== "HEAD") {
    response.setHeader("allow", "GET, HEAD");
    send(response, 405, "text/plain", "only GET\n");
    return;
  }
  const path = (request.url ?? "").split("?")[0];
  if (path === "/healthz") {
    const health = options.health();
    const body = JSON.stringify({ status: health.ok ? "ok" : "unhealthy", ...health.details });
    send(response, health.ok ? 200 : 503, "application/json", `${body}\n`);
    return;
  }
  if (path !== "/metrics") {
    send(response, 404, "text/plain", "try /metrics or /healthz\n");
    return;
  }
  if (!(await authorised(request.headers.authorization))) {
    response.setHeader("www-authenticate", "Bearer");
    send(response, 401, "text/plain", "a bearer token is required\n");
    return;
  }
  const text = await options.metrics.render();
  options.metrics.countScrape();
  send(response, 200, "text/plain; version=0.0.4; charset=utf-8", text);
}

/** Denies everything while a token is configured but cannot be read: fail closed. */
function tokenCheck(tokenFile: string | undefined): (header: string | undefined) => Promise<boolean> {
  if (tokenFile === undefined) return () => Promise.resolve(true);
  let cached: { readonly digest: Buffer | undefined; readonly readAtMs: number } | undefined;
  return async (header) => {
    const now = performance.now();
    if (cached === undefined || now - cached.readAtMs > tokenCacheMs) {
      const token = (await readFile(tokenFile, "utf8").catch(() => "")).trim();
      cached = { digest: token === "" ? undefined : sha256(token), readAtMs: now };
    }
    const given = /^Bearer (\S{1,4096})$/i.exec(header ?? "")?.[1];
    return (
      given !== undefined && cached.digest !== undefined && timingSafeEqual(sha256(given), cached.digest)
    );
  };
}

function sha256(text: string): Buffer {
  return createHash("sha256").update(text).digest();
}

function send(response: ServerResponse, status: number, type: string, body: string): void {
  if (response.headersSent) {
    response.end();
    return;
  }
  response.writeHead(status, { "content-type": type, "content-length": Buffer.byteLength(body) });
  response.end(body);
}
