import { readFileSync } from "node:fs";
import http from "node:http";
import https from "node:https";
import { join } from "node:path";
import { errorMessage, PlatformError } from "@palebluedot/shared/errors.ts";
import { z } from "zod";

/**
 * HTTP to a Docker-compatible engine. An own thin client rather than dockerode: that one brings ssh2 and a
 * second gRPC stack (15 MiB of resident memory beside what the agent has loaded anyway, measured on
 * Node 24), and its calls have no deadline.
 */
export interface EngineTransport {
  /** Whole answer, parsed as JSON (undefined when empty). Throws `container-engine-unavailable` or `container-engine-refused`. */
  call(request: EngineRequest): Promise<unknown>;
  /** Answer as it arrives. The deadline covers the time to the answer's head; `signal` ends the stream. */
  stream(request: EngineRequest): Promise<AsyncIterable<Buffer>>;
  close(): void;
}

interface EngineRequest {
  readonly method: "GET" | "POST" | "DELETE";
  /** With query, without the API version. */
  readonly path: string;
  readonly body?: unknown;
  readonly headers?: Readonly<Record<string, string>>;
  readonly deadlineMs: number;
  readonly signal?: AbortSignal;
}

const maxAnswerBytes = 32 * 1024 * 1024;

export function engineUnavailable(what: string, cause: unknown): PlatformError {
  return new PlatformError({
    code: "container-engine-unavailable",
    kind: "unavailable",
    message: `the container engine does not answer (${what}): ${errorMessage(cause)}`,
    hint: "Is the engine running, and is DOCKER_HOST right? systemctl status docker",
    cause,
  });
}

const messageSchema = z.object({ message: z.string() });

function refusal(what: string, statusCode: number, body: string): PlatformError {
  let message = body.slice(0, 500);
  try {
    message = messageSchema.safeParse(JSON.parse(body)).data?.message.slice(0, 500) ?? message;
  } catch {
    // Not JSON: the text says what there is to say.
  }
  return new PlatformError({
    code: "container-engine-refused",
    kind: "internal",
    status: statusCode,
    retryable: statusCode >= 500,
    message: `${what}: ${message}`,
  });
}

interface Address {
  readonly options: http.RequestOptions;
  readonly module: typeof http | typeof https;
  readonly agent: http.Agent;
}

function parseAddress(dockerHost: string, certPath: string | undefined): Address {
  const unix = /^unix:\/\/(\/.+)$/.exec(dockerHost)?.[1];
  if (unix !== undefined) {
    return {
      options: { socketPath: unix, host: "localhost" },
      module: http,
      agent: new http.Agent({ keepAlive: true, maxFreeSockets: 4, timeout: 30_000 }),
    };
  }
  const tcp = /^(?:tcp|https?):\/\/([^/:]+|\[[^\]]+\]):(\d+)\/?$/.exec(dockerHost);
  if (tcp?.[1] === undefined || tcp[2] === undefined) {
    throw new PlatformError({
      code: "docker-host-invalid",
      kind: "invalid",
      message: `DOCKER_HOST ${JSON.stringify(dockerHost)} is not understood`,
      hint: "unix:///var/run/docker.sock or tcp://host:2376 with DOCKER_CERT_PATH",
    });
  }
  const options = { host: tcp[1].replace(/^\[|\]$/g, ""), port: Number(tcp[2]) };
  if (certPath === undefined && !dockerHost.startsWith("https")) {
    return { options, module: http, agent: new http.Agent({ keepAlive: true, maxFreeSockets: 4 }) };
  }
  const tls =
    certPath === undefined
      ? {}
      : {
          ca: readFileSync(join(certPath, "ca.pem")),
          cert: readFileSync(join(certPath, "cert.pem")),
          key: readFileSync(join(certPath, "key.pem")),
        };
  return { options, module: https, agent: new https.Agent({ keepAlive: true, maxFreeSockets: 4, ...tls }) };
}

async function readAll(response: http.IncomingMessage): Promise<string> {
  const chunks: Buffer[] = [];
  let bytes = 0;
  for await (const chunk of response as AsyncIterable<Buffer>) {
    bytes += chunk.length;
    if (bytes > maxAnswerBytes) throw new Error(`answer larger than ${maxAnswerBytes} bytes`);
    chunks.push(chunk);
  }
  return Buffer.concat(chunks).toString("utf8");
}

const describe = (request: EngineRequest): string =>
  `${request.method} ${request.path.split("?", 1)[0] ?? ""}`;

/** Throws PlatformError `docker-host-invalid`. */
export function createEngineTransport(options: {
  readonly dockerHost: string;
  readonly certPath: string | undefined;
}): EngineTransport {
  const address = parseAddress(options.dockerHost, options.certPath);

  function open(
    request: EngineRequest,
    signal: AbortSignal,
    onHead: () => void,
  ): Promise<http.IncomingMessage> {
    const body = request.body === undefined ? undefined : Buffer.from(JSON.stringify(request.body));
    return new Promise((resolve, reject) => {
      const outgoing = address.module.request(
        {
          ...address.options,
          agent: address.agent,
          method: request.method,
          path: request.path,
          signal,
          headers: {
            ...request.headers,
            ...(body ? { "content-type": "application/json" } : {}),
            "content-length": String(body?.length ?? 0),
          },
        },
        (response) => {
          onHead();
          resolve(response);
        },
      );
      outgoing.on("error", reject);
      outgoing.end(body);
    });
  }

  return {
    async call(request) {
      const deadline = AbortSignal.timeout(request.deadlineMs);
      const signal = request.signal ? AbortSignal.any([request.signal, deadline]) : deadline;
      let text: string;
      let statusCode: number;
      try {
        const response = await open(request, signal, () => undefined);
        statusCode = response.statusCode ?? 0;
        text = await readAll(response);
      } catch (error) {
        request.signal?.throwIfAborted();
        throw engineUnavailable(describe(request), deadline.aborted ? deadline.reason : error);
      }
      // 304: the container already is as it should be.
      if (statusCode >= 400) throw refusal(describe(request), statusCode, text);
      if (text.trim() === "" || text === "OK") return undefined;
      try {
        return JSON.parse(text);
      } catch (cause) {
        throw engineUnavailable(describe(request), cause);
      }
    },
    async stream(request) {
      const head = new AbortController();
      const timer = setTimeout(
        () => head.abort(new Error(`no answer in ${request.deadlineMs} ms`)),
        request.deadlineMs,
      );
      const signal = request.signal ? AbortSignal.any([request.signal, head.signal]) : head.signal;
      let response: http.IncomingMessage;
      try {
        response = await open(request, signal, () => clearTimeout(timer));
      } catch (error) {
        request.signal?.throwIfAborted();
        throw engineUnavailable(describe(request), head.signal.aborted ? head.signal.reason : error);
      } finally {
        clearTimeout(timer);
      }
      const statusCode = response.statusCode ?? 0;
      if (statusCode >= 400) {
        const bodyTimer = setTimeout(() => response.destroy(), request.deadlineMs);
        const text = await readAll(response).catch(() => "");
        clearTimeout(bodyTimer);
        throw refusal(describe(request), statusCode, text);
      }
      return readChunks(response, describe(request), request.signal);
    },
    close() {
      address.agent.destroy();
    },
  };
}

async function* readChunks(
  response: http.IncomingMessage,
  what: string,
  signal: AbortSignal | undefined,
): AsyncGenerator<Buffer> {
  try {
    for await (const chunk of response as AsyncIterable<Buffer>) yield chunk;
  } catch (error) {
    signal?.throwIfAborted();
    throw engineUnavailable(what, error);
  } finally {
    response.destroy();
  }
}

/** Splits a byte stream into parsed JSON lines; a line that is no JSON or larger than 1 MiB ends it with an error. */
export async function* jsonLines(chunks: AsyncIterable<Buffer>): AsyncGenerator {
  const decoder = new TextDecoder();
  let rest = "";
  for await (const chunk of chunks) {
    rest += decoder.decode(chunk, { stream: true });
    if (rest.length > 1024 * 1024) throw engineUnavailable("stream", "a line larger than 1 MiB");
    let end = rest.indexOf("\n");
    while (end >= 0) {
      const line = rest.slice(0, end).trim();
      rest = rest.slice(end + 1);
      if (line !== "") {
        let value: unknown;
        try {
          value = JSON.parse(line);
        } catch (cause) {
          throw engineUnavailable("stream", cause);
        }
        yield value;
      }
      end = rest.indexOf("\n");
    }
  }
}
