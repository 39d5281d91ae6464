import { errorMessage, isPlatformError, PlatformError } from "@palebluedot/shared/errors.ts";
import { parseImageReference } from "@palebluedot/shared/image-reference.ts";
import { z } from "zod";
import type { LogFrame } from "./log-frames.ts";
import { demultiplex } from "./log-frames.ts";
import { createLimiter } from "./limiter.ts";
import { createEngineTransport, engineUnavailable, jsonLines } from "./transport.ts";

const nullish = <T extends z.ZodType>(schema: T) => schema.nullish();

const versionSchema = z.object({
  Version: z.string(),
  ApiVersion: z.string(),
  Platform: nullish(z.object({ Name: nullish(z.string()) })),
  Components: nullish(z.array(z.object({ Name: z.string(), Version: nullish(z.string()) }))),
});
export type EngineVersion = z.infer<typeof versionSchema>;

const infoSchema = z.object({
  MemTotal: nullish(z.number()),
  NCPU: nullish(z.number()),
  Runtimes: nullish(z.record(z.string(), z.unknown())),
  CDISpecDirs: nullish(z.array(z.string())),
  DiscoveredDevices: nullish(z.array(z.object({ Source: nullish(z.string()), ID: nullish(z.string()) }))),
});
export type EngineInfo = z.infer<typeof infoSchema>;

const imageSchema = z.object({
  Id: z.string(),
  Config: nullish(z.object({ Env: nullish(z.array(z.string())) })),
});
export interface ImageFacts {
  readonly id: string;
  readonly environment: readonly string[];
}

const listedSchema = z.array(
  z.object({ Id: z.string(), State: z.string(), Labels: nullish(z.record(z.string(), z.string())) }),
);
interface ListedContainer {
  readonly id: string;
  /** "created", "running", "paused", "restarting", "removing", "exited" or "dead". */
  readonly state: string;
  readonly labels: Readonly<Record<string, string>>;
}

const inspectSchema = z.object({
  Id: z.string(),
  Config: z.object({
    Labels: nullish(z.record(z.string(), z.string())),
    Env: nullish(z.array(z.string())),
  }),
  State: z.object({
    Status: z.string(),
    Running: z.boolean(),
    Paused: nullish(z.boolean()),
    OOMKilled: nullish(z.boolean()),
    ExitCode: nullish(z.int()),
    Error: nullish(z.string()),
    StartedAt: nullish(z.string()),
    FinishedAt: nullish(z.string()),
  }),
  NetworkSettings: nullish(
    z.object({
      Ports: nullish(
        z.record(
          z.string(),
          nullish(z.array(z.object({ HostIp: nullish(z.string()), HostPort: nullish(z.string()) }))),
        ),
      ),
    }),
  ),
});
export type InspectedContainer = z.infer<typeof inspectSchema>;

const engineEventSchema = z.object({
  Type: nullish(z.string()),
  Action: nullish(z.string()),
  Actor: nullish(
    z.object({ ID: nullish(z.string()), Attributes: nullish(z.record(z.string(), z.string())) }),
  ),
});
interface EngineEvent {
  readonly action: string;
  readonly containerId: string;
  readonly attributes: Readonly<Record<string, string>>;
}

const progressSchema = z.object({
  id: nullish(z.string()),
  status: nullish(z.string()),
  error: nullish(z.string()),
  progressDetail: nullish(z.object({ current: nullish(z.number()), total: nullish(z.number()) })),
});

interface PullCredentials {
  readonly server: string;
  readonly username: string;
  readonly password: string;
}

interface LogOptions {
  readonly follow: boolean;
  /** 0: everything. */
  readonly tailLines: number;
  readonly sinceUnixMs: number;
  readonly timestamps: boolean;
}

/**
 * What the agent asks of a Docker-compatible engine. Every call has a deadline. Errors:
 * `container-engine-unavailable` (no answer: nothing is known) and `container-engine-refused` (with
 * `status`, the engine's HTTP status).
 */
export interface ContainerEngineClient {
  ping(): Promise<void>;
  version(): Promise<EngineVersion>;
  info(): Promise<EngineInfo>;
  /** Undefined when the image is not on this host. Throws `refused-image-reference`. */
  inspectImage(reference: string): Promise<ImageFacts | undefined>;
  /** Throws `image-pull-failed`. */
  pull(
    reference: string,
    credentials: PullCredentials | undefined,
    options: {
      readonly stallMs: number;
      readonly totalMs: number;
      readonly signal: AbortSignal;
      readonly onProgress: (fraction: number | undefined, text: string) => void;
    },
  ): Promise<void>;
  /** Containers in any state that carry all labels ("name" or "name=value"). */
  list(labels: readonly string[]): Promise<ListedContainer[]>;
  /** Undefined when there is none. */
  inspect(idOrName: string): Promise<InspectedContainer | undefined>;
  create(name: string, body: unknown): Promise<{ readonly id: string }>;
  start(id: string): Promise<void>;
  /** SIGTERM, then SIGKILL after the grace. Resolves when it ended; also when there is none. */
  stop(id: string, graceSeconds: number): Promise<void>;
  kill(id: string): Promise<void>;
  /** With its anonymous volumes, running or not. Also resolves when there is none. */
  remove(id: string): Promise<void>;
  logs(id: string, options: LogOptions, signal: AbortSignal): Promise<AsyncIterable<LogFrame>>;
  /** Container events of containers with the label, until the signal or the engine ends it. */
  events(label: string, signal: AbortSignal): Promise<AsyncIterable<EngineEvent>>;
  close(): void;
}

const isStatus = (error: unknown, ...statuses: number[]): boolean =>
  isPlatformError(error) &&
  error.code === "container-engine-refused" &&
  error.status !== undefined &&
  statuses.includes(error.status);

function parseAnswer<T>(schema: z.ZodType<T>, what: string, value: unknown): T {
  const parsed = schema.safeParse(value);
  if (!parsed.success) throw engineUnavailable(what, z.prettifyError(parsed.error));
  return parsed.data;
}

const query = (values: Record<string, string>): string => new URLSearchParams(values).toString();

async function absentAsUndefined<T>(call: () => Promise<T>): Promise<T | undefined> {
  try {
    return await call();
  } catch (error) {
    if (isStatus(error, 404)) return undefined;
    throw error;
  }
}

/** Throws PlatformError `docker-host-invalid`. */
export function createContainerEngineClient(options: {
  readonly dockerHost: string;
  readonly certPath: string | undefined;
  readonly callMs: number;
}): ContainerEngineClient {
  const transport = createEngineTransport(options);
  // Few calls at a time: a host that starts fifty containers must not flood its engine. Pulls and stops
  // take minutes; they have places of their own so that they never hold up the short calls.
  const short = createLimiter(8);
  const pulls = createLimiter(3);
  const { callMs } = options;

  const get = (path: string): Promise<unknown> =>
    short(() => transport.call({ method: "GET", path, deadlineMs: callMs }));
  const act = (method: "POST" | "DELETE", path: string, deadlineMs: number, body?: unknown) =>
    short(() => transport.call({ method, path, deadlineMs, ...(body === undefined ? {} : { body }) }));

  async function pullNow(
    reference: string,
    credentials: PullCredentials | undefined,
    pull: Parameters<ContainerEngineClient["pull"]>[2],
  ): Promise<void> {
    const { name, tag } = parseImageReference(reference);
    const stall = new AbortController();
    let stallTimer: NodeJS.Timeout | undefined;
    const progressed = (): void => {
      clearTimeout(stallTimer);
      stallTimer = setTimeout(
        () => stall.abort(new Error(`no progress for ${Math.round(pull.stallMs / 1000)} s`)),
        pull.stallMs,
      );
    };
    const total = AbortSignal.timeout(pull.totalMs);
    const signal = AbortSignal.any([pull.signal, stall.signal, total]);
    const layers = new Map<string, { current: number; total: number }>();
    try {
      progressed();
      const chunks = await transport.stream({
        method: "POST",
        path: `/images/create?${query({ fromImage: name, tag })}`,
        deadlineMs: pull.stallMs,
        signal,
        headers: credentials
          ? {
              "x-registry-auth": Buffer.from(
                JSON.stringify({
                  username: credentials.username,
                  password: credentials.password,
                  serveraddress: credentials.server,
                }),
              ).toString("base64url"),
            }
          : {},
      });
      for await (const line of jsonLines(chunks)) {
        progressed();
        const progress = progressSchema.safeParse(line).data;
        if (!progress) continue;
        if (typeof progress.error === "string") throw new Error(progress.error.slice(0, 500));
        if (typeof progress.id === "string" && progress.progressDetail?.total && layers.size < 1000) {
          layers.set(progress.id, {
            current: progress.progressDetail.current ?? 0,
            total: progress.progressDetail.total,
          });
        }
        const sums = { current: 0, total: 0 };
        for (const layer of layers.values()) {
          sums.current += layer.current;
          sums.total += layer.total;
        }
        pull.onProgress(
          sums.total > 0 ? sums.current / sums.total : undefined,
          (progress.status ?? "").slice(0, 100),
        );
      }
    } catch (cause) {
      pull.signal.throwIfAborted();
      // The engine itself went away: not the image's fault, and no attempt is counted.
      if (
        isPlatformError(cause) &&
        cause.code === "container-engine-unavailable" &&
        !stall.signal.aborted &&
        !total.aborted
      ) {
        throw cause;
      }
      const reason = stall.signal.aborted ? stall.signal.reason : total.aborted ? total.reason : cause;
      throw new PlatformError({
        code: "image-pull-failed",
        kind: "unavailable",
        message: `image ${reference} could not be pulled: ${errorMessage(reason)}`,
        hint: "Check the image's name, the registry credential and that this host reaches the registry.",
        cause: reason,
      });
    } finally {
      clearTimeout(stallTimer);
    }
  }

  return {
    async ping() {
      await get("/_ping");
    },
    async version() {
      return parseAnswer(versionSchema, "version", await get("/version"));
    },
    async info() {
      return parseAnswer(infoSchema, "info", await get("/info"));
    },
    async inspectImage(reference) {
      const { canonical } = parseImageReference(reference);
      const path = canonical.split("/").map(encodeURIComponent).join("/");
      const answer = await absentAsUndefined(() => get(`/images/${path}/json`));
      if (answer === undefined) return undefined;
      const image = parseAnswer(imageSchema, "image inspect", answer);
      return { id: image.Id, environment: image.Config?.Env ?? [] };
    },
    pull: (reference, credentials, pull) => pulls(() => pullNow(reference, credentials, pull), pull.signal),
    async list(labels) {
      const filters = JSON.stringify({ label: labels });
      const answer = await get(`/containers/json?${query({ all: "1", filters })}`);
      return parseAnswer(listedSchema, "container list", answer).map((container) => ({
        id: container.Id,
        state: container.State,
        labels: container.Labels ?? {},
      }));
    },
    async inspect(idOrName) {
      const answer = await absentAsUndefined(() => get(`/containers/${encodeURIComponent(idOrName)}/json`));
      return answer === undefined ? undefined : parseAnswer(inspectSchema, "container inspect", answer);
    },
    async create(name, body) {
      const answer = await act("POST", `/containers/create?${query({ name })}`, callMs * 2, body);
      return { id: parseAnswer(z.object({ Id: z.string() }), "container create", answer).Id };
    },
    async start(id) {
      await act("POST", `/containers/${encodeURIComponent(id)}/start`, callMs * 4);
    },
    async stop(id, graceSeconds) {
      // Not through the limiter: a long grace would keep a place from the short calls.
      await absentAsUndefined(() =>
        transport.call({
          method: "POST",
          path: `/containers/${encodeURIComponent(id)}/stop?t=${graceSeconds}`,
          deadlineMs: callMs * 2 + graceSeconds * 1000,
        }),
      );
    },
    async kill(id) {
      try {
        await act("POST", `/containers/${encodeURIComponent(id)}/kill`, callMs);
      } catch (error) {
        // 409: it does not run.
        if (!isStatus(error, 404, 409)) throw error;
      }
    },
    async remove(id) {
      try {
        await act("DELETE", `/containers/${encodeURIComponent(id)}?force=1&v=1`, callMs * 4);
      } catch (error) {
        // 409: another removal is under way; the caller looks again.
        if (!isStatus(error, 404, 409)) throw error;
      }
    },
    async logs(id, log, signal) {
      const chunks = await transport.stream({
        method: "GET",
        path: `/containers/${encodeURIComponent(id)}/logs?${query({
          stdout: "1",
          stderr: "1",
          follow: log.follow ? "1" : "0",
          tail: log.tailLines > 0 ? String(log.tailLines) : "all",
          since: log.sinceUnixMs > 0 ? (log.sinceUnixMs / 1000).toFixed(3) : "0",
          timestamps: log.timestamps ? "1" : "0",
        })}`,
        deadlineMs: callMs,
        signal,
      });
      return demultiplex(chunks);
    },
    async events(label, signal) {
      const filters = JSON.stringify({ type: ["container"], label: [label] });
      const chunks = await transport.stream({
        method: "GET",
        path: `/events?${query({ filters })}`,
        deadlineMs: callMs,
        signal,
      });
      return parseEvents(jsonLines(chunks));
    },
    close: () => transport.close(),
  };
}

async function* parseEvents(lines: AsyncIterable<unknown>): AsyncGenerator<EngineEvent> {
  for await (const line of lines) {
    const event = engineEventSchema.safeParse(line).data;
    if (!event) continue;
    yield {
      action: event.Action ?? "",
      containerId: event.Actor?.ID ?? "",
      attributes: event.Actor?.Attributes ?? {},
    };
  }
}
