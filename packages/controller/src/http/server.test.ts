import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { request } from "node:https";
import { connect } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, afterEach, beforeAll, describe, expect, test } from "vitest";
import { ensureAuthorities } from "../enrolment/authority.ts";
import { issueListenerCertificate } from "../enrolment/certificates.ts";
import { maxBodyBytes } from "./body.ts";
import { type HttpServer, startHttpServer } from "./server.ts";
import { createTestApi, type TestApi } from "./testing.ts";

let api: TestApi;
let dir = "";
const servers: HttpServer[] = [];

beforeAll(async () => {
  api = await createTestApi();
  dir = mkdtempSync(join(tmpdir(), "pbd-server-"));
});
afterEach(async () => {
  for (const server of servers.splice(0)) await server.stop(0);
});
afterAll(async () => {
  rmSync(dir, { recursive: true });
  await api.close();
});

async function listen(tls: { SERVER_TLS_CERT_FILE?: string; SERVER_TLS_KEY_FILE?: string } = {}) {
  const server = await startHttpServer(api.app, {
    SERVER_HOST: "127.0.0.1",
    SERVER_PORT: 0,
    SERVER_TLS_CERT_FILE: tls.SERVER_TLS_CERT_FILE,
    SERVER_TLS_KEY_FILE: tls.SERVER_TLS_KEY_FILE,
  });
  servers.push(server);
  return server;
}

/** Sends bytes as they are and collects what comes back until the server closes. */
function raw(port: number, bytes: string): Promise<string> {
  return new Promise((resolve, reject) => {
    const socket = connect(port, "127.0.0.1", () => socket.write(bytes));
    let text = "";
    socket.setTimeout(20_000, () => socket.destroy(new Error("no answer in time")));
    socket.on("data", (chunk) => (text += chunk.toString()));
    socket.on("close", () => resolve(text));
    socket.on("error", reject);
  });
}

describe("the HTTP listener", () => {
  test("what is no HTTP gets a problem document", async () => {
    const { port } = await listen();
    const answer = await raw(port, "GARBAGE\r\n\r\n");
    expect(answer).toContain("HTTP/1.1 400 ");
    expect(answer).toContain("application/problem+json");
    expect(answer).toContain('"code":"invalid-http"');
    const large = await raw(port, `GET /healthz HTTP/1.1\r\nhost: a\r\nx-big: ${"a".repeat(20_000)}\r\n\r\n`);
    expect(large).toContain('"code":"headers-too-large"');
  });

  test("a body that is too large is refused and its connection closed", async () => {
    const { port } = await listen();
    const answer = await raw(
      port,
      `POST /api/v1/tenants HTTP/1.1\r\nhost: a\r\nauthorization: Bearer ${api.adminToken}\r\n` +
        `content-type: application/json\r\ncontent-length: ${maxBodyBytes + 1}\r\n\r\n{`,
    );
    expect(answer).toContain("HTTP/1.1 413 ");
    expect(answer).toContain('"code":"body-too-large"');
  });

  test("the caller's address is in the log line", async () => {
    const { port } = await listen();
    await fetch(`http://127.0.0.1:${port}/api/v1/whoami`, { headers: { "x-request-id": "addressed" } });
    const line = api.logLines.find((entry) => entry["request_id"] === "addressed");
    expect(line).toMatchObject({ remote_address: "127.0.0.1", status: 401, code: "unauthenticated" });
  });

  test("with a certificate it speaks TLS", async () => {
    const [authority] = await ensureAuthorities(api.deps);
    const issued = await issueListenerCertificate(authority, ["localhost"]);
    const files = {
      SERVER_TLS_CERT_FILE: join(dir, "cert.pem"),
      SERVER_TLS_KEY_FILE: join(dir, "key.pem"),
    };
    writeFileSync(files.SERVER_TLS_CERT_FILE, issued.certificatePem);
    writeFileSync(files.SERVER_TLS_KEY_FILE, issued.privateKeyPem);
    const server = await listen(files);
    expect(server.tls).toBe(true);
    const status = await new Promise((resolve, reject) => {
      request(
        {
          host: "localhost",
          port: server.port,
          path: "/healthz",
          ca: authority.certificatePem,
          family: 4,
          agent: false,
        },
        (response) => {
          response.resume();
          resolve(response.statusCode);
        },
      )
        .on("error", reject)
        .end();
    });
    expect(status).toBe(200);
  });

  test("a certificate that cannot be read is told by name", async () => {
    const missing = {
      SERVER_TLS_CERT_FILE: join(dir, "none.pem"),
      SERVER_TLS_KEY_FILE: join(dir, "none.key"),
    };
    await expect(listen(missing)).rejects.toMatchObject({ code: "http-certificate-unreadable" });
  });
});
