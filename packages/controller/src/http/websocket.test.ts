import { once } from "node:events";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { WebSocket } from "ws";
import { startHttpServer, type HttpServer } from "./server.ts";
import { createTestApi, type TestApi } from "./testing.ts";

let api: TestApi;
let server: HttpServer;
let acme: { id: string; token: string };
let globex: { id: string; token: string };

beforeAll(async () => {
  api = await createTestApi();
  acme = await api.makeTenant("acme");
  globex = await api.makeTenant("globex");
  server = await startHttpServer(api.app, { SERVER_HOST: "127.0.0.1", SERVER_PORT: 0 });
});
afterAll(async () => {
  await server.stop(1000);
  await api.close();
});

interface Opened {
  readonly socket: WebSocket;
  readonly messages: { readonly type: string; readonly tenant_id: string | null; readonly seq: number }[];
}

async function open(path: string, token: string): Promise<Opened> {
  const socket = new WebSocket(`ws://127.0.0.1:${server.port}${path}`, {
    headers: { authorization: `Bearer ${token}` },
  });
  const messages: Opened["messages"] = [];
  socket.on("message", (data: Buffer) =>
    messages.push(JSON.parse(data.toString()) as Opened["messages"][number]),
  );
  await once(socket, "open", { signal: AbortSignal.timeout(10_000) });
  return { socket, messages };
}

/** The HTTP answer to an upgrade that was refused. */
async function refusal(
  path: string,
  headers: Record<string, string>,
): Promise<{ status: number; code: unknown }> {
  const socket = new WebSocket(`ws://127.0.0.1:${server.port}${path}`, { headers });
  socket.on("error", () => undefined);
  const [, response] = (await once(socket, "unexpected-response", {
    signal: AbortSignal.timeout(10_000),
  })) as [unknown, NodeJS.ReadableStream & { statusCode: number }];
  let text = "";
  for await (const chunk of response) text += String(chunk);
  return { status: response.statusCode, code: (JSON.parse(text) as { code: unknown }).code };
}

describe("a WebSocket on the event stream", () => {
  test("brings each event as one message, to a tenant only its own", async () => {
    const admin = await open("/api/v1/events?after_seq=0", api.adminToken);
    const tenant = await open("/api/v1/events?after_seq=0", acme.token);
    await expect
      .poll(() => admin.messages.filter((event) => event.tenant_id === globex.id).length, { timeout: 10_000 })
      .toBeGreaterThan(0);
    await expect.poll(() => tenant.messages.length, { timeout: 10_000 }).toBeGreaterThan(0);
    expect(tenant.messages.every((event) => event.tenant_id === acme.id)).toBe(true);
    const sequences = admin.messages.map((event) => event.seq);
    expect(sequences).toEqual([...new Set(sequences)].toSorted((a, b) => a - b));
    admin.socket.close();
    tenant.socket.close();
  });

  test("takes the token as a protocol, since browsers can set no header", async () => {
    const socket = new WebSocket(`ws://127.0.0.1:${server.port}/api/v1/events`, ["bearer", acme.token]);
    await once(socket, "open", { signal: AbortSignal.timeout(10_000) });
    expect(socket.protocol).toBe("bearer");
    socket.close();
  });

  test("ends when its token is revoked", async () => {
    const token = await api.call("POST", `/api/v1/tenants/${acme.id}/tokens`, { json: { name: "short" } });
    const { socket } = await open("/api/v1/events", token.json.token);
    const closed = once(socket, "close", { signal: AbortSignal.timeout(10_000) });
    const revoked = await api.call("DELETE", `/api/v1/tenants/${acme.id}/tokens/${token.json.id}`);
    expect(revoked.status).toBeLessThan(300);
    await closed;
  });

  test("is refused with a problem document like any request", async () => {
    expect(await refusal("/api/v1/events", {})).toEqual({ status: 401, code: "unauthenticated" });
    expect(
      await refusal("/api/v1/events?nonsense=1", { authorization: `Bearer ${acme.token}` }),
    ).toMatchObject({ status: 400 });
    expect(await refusal("/api/v1/allocations", { authorization: `Bearer ${acme.token}` })).toEqual({
      status: 400,
      code: "not-a-stream",
    });
    expect(await refusal("/nowhere", { authorization: `Bearer ${acme.token}` })).toMatchObject({
      status: 404,
    });
  });
});
