import type { IncomingMessage, Server } from "node:http";
import { STATUS_CODES } from "node:http";
import type { Duplex } from "node:stream";
import { PlatformError } from "@palebluedot/shared/errors.ts";
import type { Hono } from "hono";
import { type WebSocket, WebSocketServer } from "ws";
import { problemResponse } from "./problem.ts";
import type { HttpEnv } from "./route.ts";

/**
 * WebSocket for the routes that stream (events, logs): the same path, query, token and permissions, asked
 * for with an upgrade. Each event is one text message (a JSON document), each piece of a log one message.
 * The stream goes one way: what a client sends is not read.
 */
const streamed = /^(application\/x-ndjson|text\/plain|text\/event-stream)\b/;
const pingMs = 30_000;
/** A browser cannot set headers on a WebSocket: it offers the protocols "bearer" and the token. */
const bearerProtocol = "bearer";

export interface WebSockets {
  /** Ends every connection with "going away". */
  close(): void;
}

export function serveWebSockets(server: Server, app: Hono<HttpEnv>): WebSockets {
  const sockets = new WebSocketServer({
    noServer: true,
    // Clients have nothing to say: a large message is a mistake or an attack.
    maxPayload: 1024,
    perMessageDeflate: false,
    handleProtocols: (protocols) => (protocols.has(bearerProtocol) ? bearerProtocol : false),
  });
  server.on("upgrade", (request, socket, head) => {
    socket.on("error", () => socket.destroy());
    void upgrade(request, socket, head).catch(() => socket.destroy());
  });

  async function upgrade(request: IncomingMessage, socket: Duplex, head: Buffer): Promise<void> {
    const gone = new AbortController();
    socket.once("close", () => gone.abort());
    const answer = await app.fetch(asStreamRequest(request, gone.signal), { incoming: request });
    if (answer.status !== 200) {
      await refuse(socket, answer);
      return;
    }
    if (!streamed.test(answer.headers.get("content-type") ?? "") || answer.body === null) {
      await answer.body?.cancel();
      await refuse(socket, notAStream(answer.headers.get("x-request-id") ?? ""));
      return;
    }
    const { body } = answer;
    sockets.handleUpgrade(request, socket, head, (client) => {
      void pump(client, body);
    });
  }

  return {
    close() {
      for (const client of sockets.clients) client.close(1001, "the controller stops");
      sockets.close();
    },
  };
}

function asStreamRequest(request: IncomingMessage, signal: AbortSignal): Request {
  const headers = new Headers();
  for (const name of ["authorization", "x-request-id", "last-event-id"]) {
    const value = request.headers[name];
    if (typeof value === "string") headers.set(name, value);
  }
  const offered = (request.headers["sec-websocket-protocol"] ?? "").split(",").map((each) => each.trim());
  const token = offered.find((each) => each !== bearerProtocol && each !== "");
  if (!headers.has("authorization") && offered.includes(bearerProtocol) && token !== undefined) {
    headers.set("authorization", `Bearer ${token}`);
  }
  headers.set("accept", "application/x-ndjson");
  return new Request(new URL(request.url ?? "/", "http://localhost"), { headers, signal });
}

function notAStream(requestId: string): Response {
  return problemResponse(
    new PlatformError({
      code: "not-a-stream",
      kind: "invalid",
      message: "this path does not stream",
      hint: "Open a WebSocket on /api/v1/events or /api/v1/allocations/{id}/logs; ask for others without an upgrade.",
    }),
    requestId,
  );
}

/** The problem document, as an HTTP answer to the upgrade. */
async function refuse(socket: Duplex, refusal: Response): Promise<void> {
  const body = await refusal.text();
  const headers = [...refusal.headers].filter(([name]) => name !== "content-length" && name !== "connection");
  socket.end(
    `HTTP/1.1 ${refusal.status} ${STATUS_CODES[refusal.status] ?? "Error"}\r\n${headers
      .map(([name, value]) => `${name}: ${value}\r\n`)
      .join("")}content-length: ${Buffer.byteLength(body)}\r\nconnection: close\r\n\r\n${body}`,
  );
}

async function pump(client: WebSocket, body: ReadableStream<Uint8Array>): Promise<void> {
  const reader = body.getReader();
  let answered = true;
  client.on("pong", () => {
    answered = true;
  });
  client.on("error", () => client.terminate());
  client.once("close", () => void reader.cancel().catch(() => undefined));
  const ping = setInterval(() => {
    if (!answered) client.terminate();
    answered = false;
    client.ping();
  }, pingMs);
  const decoder = new TextDecoder();
  try {
    for (;;) {
      const next = await reader.read();
      if (next.done) break;
      const text = decoder.decode(next.value, { stream: true });
      // A blank line is the keep-alive of the plain stream; here pings do that.
      if (text.trim() === "") continue;
      await new Promise<void>((resolve, reject) => {
        client.send(text, (error) => (error ? reject(error) : resolve()));
      });
    }
    client.close(1000, "the stream ended");
  } catch {
    client.close(1011, "the stream failed");
  } finally {
    clearInterval(ping);
  }
}
