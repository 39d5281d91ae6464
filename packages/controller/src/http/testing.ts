import { mkdtemp, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import type { Clock } from "@palebluedot/shared/clock.ts";
import type { LogChunk } from "@palebluedot/shared/generated/palebluedot/agent/v1/agent.ts";
import { PlatformError } from "@palebluedot/shared/errors.ts";
import { createSecretBox } from "@palebluedot/shared/secret-box.ts";
import type { Hono } from "hono";
import { pino } from "pino";
import { Registry } from "prom-client";
import { uuidv7 } from "uuidv7";
import { createAllocationFeature } from "../allocations/feature.ts";
import { loadConfig } from "../config/load.ts";
import { createNotifications } from "../db/notifications.ts";
import { createTestDatabase } from "../db/testing.ts";
import type { Dependencies } from "../dependencies.ts";
import { createEnrolmentService } from "../enrolment/service.ts";
import { createEventFeature, type EventFeature } from "../events/feature.ts";
import { createIdentityService, type IdentityService } from "../identity/identity.ts";
import type { Role } from "../identity/permissions.ts";
import { createFailpoints } from "../reconciler/failpoints.ts";
import { createServerStates } from "../servers/state-machine.ts";
import { createTelemetryStore } from "../telemetry/store.ts";
import type { TelemetryStore } from "../telemetry/types.ts";
import { createHttpApp } from "./app.ts";
import type { ReadinessCheck } from "./context.ts";
import type { HttpEnv, Route } from "./route.ts";
import { allRoutes } from "./routes.ts";

/** A clock that a test moves; it starts at the real time, which the database shares. */
export interface TestClock extends Clock {
  advance(ms: number): void;
}

export function createTestClock(): TestClock {
  let offset = 0;
  return {
    now: () => Date.now() + offset,
    sleep: () => Promise.reject(new Error("nothing under test here sleeps")),
    advance(ms) {
      offset += ms;
    },
  };
}

export interface ApiAnswer {
  readonly status: number;
  readonly headers: Headers;
  // Tests reach into answers by name; what is not there is undefined and fails the expectation.
  // eslint-disable-next-line typescript/no-explicit-any
  readonly json: any;
}

export interface TestApi {
  readonly app: Hono<HttpEnv>;
  readonly routes: readonly Route[];
  readonly deps: Dependencies;
  readonly clock: TestClock;
  readonly identity: IdentityService;
  readonly events: EventFeature;
  readonly telemetry: TelemetryStore;
  readonly adminToken: string;
  /** What agents would answer to a request for logs, by server id; absent: not connected. */
  readonly logs: Map<string, (signal: AbortSignal) => AsyncIterable<LogChunk>>;
  /** Log lines of the process, parsed. */
  readonly logLines: Record<string, unknown>[];
  /** Server ids that an operator's change was announced for. */
  readonly fleetChanges: string[];
  readiness: ReadinessCheck[];
  call(method: string, path: string, options?: CallOptions): Promise<ApiAnswer>;
  makeTenant(name: string): Promise<{ id: string; token: string }>;
  makeStaff(role: Exclude<Role, "member">): Promise<string>;
  makeServer(name: string, options?: { state?: string; gpus?: number; model?: string }): Promise<TestServer>;
  close(): Promise<void>;
}

export interface TestServer {
  readonly id: string;
  readonly gpus: { readonly id: string; readonly uuid: string }[];
}

export interface CallOptions {
  /** "" sends none; absent: the admin's. */
  readonly token?: string;
  readonly json?: unknown;
  readonly body?: string | Uint8Array;
  readonly headers?: Readonly<Record<string, string>>;
}

/** The whole REST API over a real database, without listeners; agents are played by the test. */
export async function createTestApi(settings: Readonly<Record<string, string>> = {}): Promise<TestApi> {
  const database = await createTestDatabase();
  const dataDir = await mkdtemp(join(tmpdir(), "pbd-http-"));
  const logLines: Record<string, unknown>[] = [];
  const log = pino(
    { level: "debug" },
    { write: (line: string) => logLines.push(JSON.parse(line) as Record<string, unknown>) },
  );
  const clock = createTestClock();
  const config = loadConfig({ PALEBLUEDOT_DATA_DIR: dataDir, ...settings });
  const notifications = createNotifications(database.sql, { log });
  const deps: Dependencies = {
    config,
    sql: database.sql,
    clock,
    log,
    failpoints: createFailpoints(undefined),
    secrets: createSecretBox(Buffer.alloc(32, 7)),
    notifications,
    metrics: new Registry(),
    replicaId: uuidv7(),
  };
  const identity = createIdentityService(deps);
  let adminToken = "";
  await identity.bootstrap((token) => {
    adminToken = token;
    return Promise.resolve();
  });
  const events = createEventFeature(deps, { relayPollMs: 50 });
  events.start();
  const allocations = createAllocationFeature(deps, {
    desiredStateChanged: () => undefined,
    eventsAppended: () => events.poke(),
  });
  const enrolment = await createEnrolmentService(deps, { disconnect: () => undefined });
  const telemetry = createTelemetryStore();
  const logs: TestApi["logs"] = new Map();
  const fleetChanges: string[] = [];
  const stopping = new AbortController();
  const api = { readiness: [{ name: "database", ready: true, message: "" }] as ReadinessCheck[] };
  const routes = allRoutes({
    deps,
    identity,
    enrolment,
    sessions: {
      openLogs(serverId, _request, signal) {
        const source = logs.get(serverId);
        if (source !== undefined) return source(signal);
        throw new PlatformError({
          code: "agent-not-connected",
          kind: "conflict",
          message: "the agent has no session here",
        });
      },
    },
    telemetry,
    events,
    allocations: allocations.service,
    serverStates: createServerStates(deps),
    fleetChanged: (ids) => fleetChanges.push(...ids),
    readiness: () => Promise.resolve(api.readiness),
    version: "0.0.0-test",
  });
  const app = createHttpApp({
    routes,
    identity,
    log,
    metrics: deps.metrics,
    stopping: stopping.signal,
    checkResponses: true,
  });

  async function call(method: string, path: string, options: CallOptions = {}): Promise<ApiAnswer> {
    const token = options.token ?? adminToken;
    const body = options.json === undefined ? options.body : JSON.stringify(options.json);
    const response = await app.request(path, {
      method,
      headers: {
        ...(token === "" ? {} : { authorization: `Bearer ${token}` }),
        ...(body === undefined ? {} : { "content-type": "application/json" }),
        ...options.headers,
      },
      ...(body === undefined ? {} : { body }),
    });
    const text = await response.text();
    const isJson = /^application\/(problem\+)?json/.test(response.headers.get("content-type") ?? "");
    return {
      status: response.status,
      headers: response.headers,
      json: isJson && text !== "" ? (JSON.parse(text) as unknown) : text,
    };
  }

  async function makeServer(
    name: string,
    options: { state?: string; gpus?: number; model?: string } = {},
  ): Promise<TestServer> {
    const id = uuidv7();
    await database.sql`
      insert into servers (id, name, state, session_replica, connected_at)
      values (${id}, ${name}, ${options.state ?? "available"}, ${deps.replicaId}, now())`;
    const gpus = Array.from({ length: options.gpus ?? 0 }, (_item, index) => ({
      id: uuidv7(),
      uuid: `GPU-${uuidv7()}`,
      index,
    }));
    for (const gpu of gpus) {
      await database.sql`
        insert into gpus (id, server_id, uuid, index, model, pci_bus_id, memory_bytes, inventory, health)
        values (${gpu.id}, ${id}, ${gpu.uuid}, ${gpu.index}, ${options.model ?? "NVIDIA H100 80GB HBM3"},
                ${`00000000:${gpu.index}8:00.0`}, ${85_520_809_984}, ${database.sql.json({ driverVersion: "570.86" })},
                'healthy')`;
    }
    return { id, gpus };
  }

  return Object.assign(api, {
    app,
    routes,
    deps,
    clock,
    identity,
    events,
    telemetry,
    adminToken,
    logs,
    logLines,
    fleetChanges,
    call,
    makeServer,
    async makeTenant(name: string) {
      const tenant = await identity.createTenant(name, "system");
      const token = await identity.createToken({
        tenantId: tenant.id,
        name: "test",
        role: "member",
        expiresAt: undefined,
        createdBy: null,
        actor: "system",
      });
      return { id: tenant.id, token: token.token };
    },
    async makeStaff(role: Exclude<Role, "member">) {
      const token = await identity.createToken({
        tenantId: null,
        name: `test ${role}`,
        role,
        expiresAt: undefined,
        createdBy: null,
        actor: "system",
      });
      return token.token;
    },
    async close() {
      stopping.abort(new Error("the test ends"));
      identity.stop();
      await events.stop();
      await notifications.close();
      await database.close();
      await rm(dataDir, { recursive: true, force: true });
    },
  });
}
