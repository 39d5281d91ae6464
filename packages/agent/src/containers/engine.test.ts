import { mkdtemp, rm } from "node:fs/promises";
import http from "node:http";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterEach, beforeEach, describe, expect, test } from "vitest";
import { createContainerEngineClient, type ContainerEngineClient } from "./engine.ts";
import { demultiplex } from "./log-frames.ts";

async function* chunked(data: Buffer, size: number): AsyncGenerator<Buffer> {
  for (let at = 0; at < data.length; at += size) yield data.subarray(at, at + size);
}
function frame(stream: number, text: string): Buffer {
  const header = Buffer.from([stream, 0, 0, 0, 0, 0, 0, 0]);
  header.writeUInt32BE(Buffer.byteLength(text), 4);
  return Buffer.concat([header, Buffer.from(text)]);
}

describe("container output", () => {
  test.each([1, 3, 7, 8, 9, 1000])("is taken apart whatever the pieces: %i bytes", async (size) => {
    const data = Buffer.concat([frame(1, "hello\n"), frame(2, "grr\n"), frame(1, ""), frame(1, "again\n")]);
    const seen = { stdout: "", stderr: "" };
    for await (const { stream, data: piece } of demultiplex(chunked(data, size)))
      seen[stream] += piece.toString();
    expect(seen).toEqual({ stdout: "hello\nagain\n", stderr: "grr\n" });
  });
  test("of a container with a terminal is passed on as it is", async () => {
    let text = "";
    for await (const { data } of demultiplex(chunked(Buffer.from("plain text, no frames"), 5)))
      text += data.toString();
    expect(text).toBe("plain text, no frames");
  });
});

describe("an engine that misbehaves", () => {
  let dir: string;
  let server: http.Server;
  let client: ContainerEngineClient;
  let answer: http.RequestListener;
  beforeEach(async () => {
    dir = await mkdtemp(join(tmpdir(), "pbd-engine-"));
    const socketPath = join(dir, "s");
    server = http.createServer((request, response) => answer(request, response));
    await new Promise<void>((resolve) => server.listen(socketPath, resolve));
    client = createContainerEngineClient({
      dockerHost: `unix://${socketPath}`,
      certPath: undefined,
      callMs: 300,
    });
  });
  afterEach(async () => {
    client.close();
    server.closeAllConnections();
    await new Promise((resolve) => server.close(resolve));
    await rm(dir, { recursive: true, force: true });
  });
  const pull = (signal = new AbortController().signal) => {
    const progress: (number | undefined)[] = [];
    const done = client.pull(
      "a/b:1",
      { server: "r", username: "u", password: "secret" },
      {
        stallMs: 200,
        totalMs: 5000,
        signal,
        onProgress: (fraction) => progress.push(fraction),
      },
    );
    return { done, progress };
  };

  test("accepts and never answers: the deadline ends the call", async () => {
    answer = () => undefined;
    await expect(client.version()).rejects.toMatchObject({
      code: "container-engine-unavailable",
      retryable: true,
    });
    await expect(client.stop("x", 0)).rejects.toMatchObject({ code: "container-engine-unavailable" });
    await expect(client.events("l", new AbortController().signal)).rejects.toMatchObject({
      code: "container-engine-unavailable",
    });
  });
  test("hangs in every call: other calls still get their deadline", async () => {
    answer = () => undefined;
    const calls = await Promise.allSettled(Array.from({ length: 20 }, () => client.ping()));
    expect(calls.every((call) => call.status === "rejected")).toBe(true);
  });
  test("answers nonsense", async () => {
    answer = (_request, response) => response.end('{"Version": 7}');
    await expect(client.version()).rejects.toMatchObject({ code: "container-engine-unavailable" });
    answer = (_request, response) => response.end("<html>");
    await expect(client.info()).rejects.toMatchObject({ code: "container-engine-unavailable" });
  });
  test("is asked about an image only by a path of images", async () => {
    const asked: string[] = [];
    answer = (request, response) => {
      asked.push(String(request.url));
      response.end('{"Id":"sha256:1"}');
    };
    await expect(client.inspectImage("a/../../containers/json")).rejects.toMatchObject({
      code: "refused-image-reference",
    });
    await client.inspectImage("r.example:5000/a/b");
    expect(asked.map(decodeURIComponent)).toEqual(["/images/r.example:5000/a/b:latest/json"]);
  });
  test("refuses with a message; what is not there is undefined", async () => {
    answer = (_request, response) => {
      response.statusCode = 409;
      response.end('{"message":"name in use"}');
    };
    await expect(client.create("n", {})).rejects.toMatchObject({
      code: "container-engine-refused",
      status: 409,
    });
    answer = (_request, response) => {
      response.statusCode = 404;
      response.end('{"message":"no such"}');
    };
    expect(await client.inspect("n")).toBeUndefined();
    expect(await client.inspectImage("n")).toBeUndefined();
    await client.remove("n");
  });
  test("a pull reports progress, sends the credential, and fails with the registry's words but never the password", async () => {
    let auth = "";
    answer = (request, response) => {
      auth = String(request.headers["x-registry-auth"]);
      response.write(
        '{"id":"1","status":"Downloading","progressDetail":{"current":25,"total":100}}\n{"id":"2","sta',
      );
      response.write('tus":"Downloading","progressDetail":{"current":25,"total":100}}\n');
      response.end('{"error":"manifest unknown"}\n');
    };
    const { done, progress } = pull();
    await expect(done).rejects.toMatchObject({ code: "image-pull-failed" });
    const error: unknown = await done.catch((reason: unknown) => reason);
    expect(String(error)).toContain("manifest unknown");
    expect(String(error)).not.toContain("secret");
    expect(progress).toEqual([0.25, 0.25]);
    expect(JSON.parse(Buffer.from(auth, "base64url").toString())).toEqual({
      username: "u",
      password: "secret",
      serveraddress: "r",
    });
  });
  test("a pull without progress ends, one that is aborted ends at once", async () => {
    answer = (_request, response) => void response.write('{"status":"Pulling"}\n');
    await expect(pull().done).rejects.toThrow(/no progress/);
    const abort = new AbortController();
    const { done } = pull(abort.signal);
    abort.abort(new Error("released"));
    await expect(done).rejects.toThrow("released");
  });
  test("an engine that dies in a pull is no fault of the image", async () => {
    answer = (_request, response) => {
      response.write('{"status":"Pulling"}\n');
      setTimeout(() => response.destroy(), 20);
    };
    await expect(pull().done).rejects.toMatchObject({ code: "container-engine-unavailable" });
  });
});

test("DOCKER_HOST that is not understood is refused with the forms that are", () => {
  expect(() =>
    createContainerEngineClient({ dockerHost: "ssh://host", certPath: undefined, callMs: 1 }),
  ).toThrow(/not understood/);
});
