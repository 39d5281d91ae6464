import { randomUUID } from "node:crypto";
import { readFileSync } from "node:fs";
import { createServer, type Server, STATUS_CODES } from "node:http";
import { createServer as createTlsServer } from "node:https";
import type { AddressInfo } from "node:net";
import type { Duplex } from "node:stream";
import { getRequestListener } from "@hono/node-server";
import { PlatformError } from "@palebluedot/shared/errors.ts";
import type { Hono } from "hono";
import type { ControllerConfig } from "../config/config.ts";
import { problemContentType, problemOf } from "./problem.ts";
import type { HttpEnv } from "./route.ts";
import { serveWebSockets } from "./websocket.ts";

export interface HttpServer {
  /** The port in use, also when 0 was asked for. */
  readonly port: number;
  readonly tls: boolean;
  /** Takes no new connection, lets open requests end, and cuts what is left after `deadlineMs`. */
  stop(deadlineMs: number): Promise<void>;
}

const headersTimeoutMs = 10_000;
/** For receiving a whole request; answers may take as long as they like (streams). */
const requestTimeoutMs = 30_000;
const keepAliveTimeoutMs = 65_000;
const sweepMs = 50;

/** Throws PlatformError `http-listen-failed` or `http-certificate-unreadable`. */
export async function startHttpServer(
  app: Hono<HttpEnv>,
  config: Pick<
    ControllerConfig,
    "SERVER_HOST" | "SERVER_PORT" | "SERVER_TLS_CERT_FILE" | "SERVER_TLS_KEY_FILE"
  >,
): Promise<HttpServer> {
  const listener = getRequestListener(app.fetch);
  const timeouts = {
    headersTimeout: headersTimeoutMs,
    requestTimeout: requestTimeoutMs,
    keepAliveTimeout: keepAliveTimeoutMs,
    maxHeaderSize: 16 * 1024,
  };
  const tls = readCertificate(config);
  const onRequest: Parameters<typeof createServer>[1] = (request, response) => {
    void listener(request, response);
  };
  const server: Server =
    tls === undefined
      ? createServer(timeouts, onRequest)
      : createTlsServer({ ...timeouts, ...tls, minVersion: "TLSv1.2" }, onRequest);
  server.on("clientError", refuseUnreadable);
  const webSockets = serveWebSockets(server, app);
  await new Promise<void>((resolve, reject) => {
    const onError = (cause: Error): void => {
      reject(
        new PlatformError({
          code: "http-listen-failed",
          kind: "unavailable",
          message: `cannot listen on ${config.SERVER_HOST} port ${config.SERVER_PORT}: ${cause.message}`,
          hint: "Is another process using the port? SERVER_PORT and SERVER_HOST choose another.",
          cause,
        }),
      );
    };
    server.once("error", onError);
    server.listen(config.SERVER_PORT, config.SERVER_HOST, () => {
      server.off("error", onError);
      resolve();
    });
  });
  const address = server.address() as AddressInfo;
  return {
    port: address.port,
    tls: tls !== undefined,
    stop: (deadlineMs) =>
      new Promise((resolve) => {
        webSockets.close();
        const cut = setTimeout(() => server.closeAllConnections(), deadlineMs);
        // A connection whose last answer has just ended would stay for its keep-alive time.
        const sweep = setInterval(() => server.closeIdleConnections(), sweepMs);
        server.close(() => {
          clearTimeout(cut);
          clearInterval(sweep);
          resolve();
        });
        server.closeIdleConnections();
      }),
  };
}

const unreadable: Readonly<Record<string, readonly [status: number, code: string, detail: string]>> = {
  HPE_HEADER_OVERFLOW: [431, "headers-too-large", "the request's headers are too large"],
  ERR_HTTP_REQUEST_TIMEOUT: [408, "request-timeout", "the request did not arrive in time"],
};

/** What is no HTTP request never reaches the app; it still gets a problem document. */
function refuseUnreadable(error: NodeJS.ErrnoException, socket: Duplex): void {
  if (error.code === "ECONNRESET" || !socket.writable) {
    socket.destroy();
    return;
  }
  const [status, code, detail] = unreadable[error.code ?? ""] ?? [
    400,
    "invalid-http",
    "this is not a valid HTTP request",
  ];
  const problem = problemOf(
    new PlatformError({
      code,
      kind: "invalid",
      status,
      message: detail,
      hint: "Speak HTTP/1.1, with less than 16 KiB of headers.",
    }),
    randomUUID(),
  );
  const body = JSON.stringify(problem);
  socket.end(
    `HTTP/1.1 ${status} ${STATUS_CODES[status] ?? "Error"}\r\ncontent-type: ${problemContentType}\r\n` +
      `content-length: ${Buffer.byteLength(body)}\r\nconnection: close\r\n\r\n${body}`,
  );
}

function readCertificate(
  config: Pick<ControllerConfig, "SERVER_TLS_CERT_FILE" | "SERVER_TLS_KEY_FILE">,
): { cert: Buffer; key: Buffer } | undefined {
  if (config.SERVER_TLS_CERT_FILE === undefined || config.SERVER_TLS_KEY_FILE === undefined) return undefined;
  try {
    return {
      cert: readFileSync(config.SERVER_TLS_CERT_FILE),
      key: readFileSync(config.SERVER_TLS_KEY_FILE),
    };
  } catch (cause) {
    throw new PlatformError({
      code: "http-certificate-unreadable",
      kind: "invalid",
      message: `the REST listener's certificate or key cannot be read: ${cause instanceof Error ? cause.message : ""}`,
      hint: "SERVER_TLS_CERT_FILE and SERVER_TLS_KEY_FILE name PEM files that the controller's user may read.",
      cause,
    });
  }
}
