import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { createTestDatabase, type TestDatabase } from "../../packages/controller/src/db/testing.ts";
import { startAgent, type AgentProcess } from "../../packages/simulator/src/cluster/agent.ts";
import { createApi, type Api, type Json } from "../../packages/simulator/src/cluster/api.ts";
import { startController, type ControllerProcess } from "../../packages/simulator/src/cluster/controller.ts";
import { eventually } from "../../packages/simulator/src/cluster/eventually.ts";
import {
  createSimulatedServer,
  type SimulatedServer,
  type SimulatedServerOptions,
} from "../../packages/simulator/src/server.ts";

/** A GPU server of the test: simulated GPUs, the real agent. */
export interface TestHost {
  readonly server: SimulatedServer;
  agent: AgentProcess;
  readonly serverId: string;
}

/** A real controller on a real database, and whatever hosts the test adds. Everything ends with it. */
export interface TestPlatform extends AsyncDisposable {
  readonly directory: string;
  readonly database: TestDatabase;
  controller: ControllerProcess;
  readonly admin: Api;
  /** A tenant with a token of its own. */
  tenant(name: string): Promise<{ readonly id: string; readonly api: Api }>;
  joinToken(body?: Record<string, unknown>): Promise<string>;
  addHost(options: {
    readonly name: string;
    readonly model: SimulatedServerOptions["model"];
    readonly count: number;
    readonly env: (server: SimulatedServer) => Record<string, string>;
    /** Default: the controller's own. */
    readonly enrolmentEndpoint?: string;
  }): Promise<TestHost>;
  /** Registers something to be ended before the platform. */
  defer(end: () => Promise<unknown> | void): void;
}

let seed = 100;

export async function startPlatform(
  options: { readonly env?: Record<string, string> } = {},
): Promise<TestPlatform> {
  const directory = mkdtempSync(join(tmpdir(), "palebluedot-e2e-"));
  const database = await createTestDatabase();
  const endings: (() => Promise<unknown> | void)[] = [];
  const controller = await startController({
    dataDir: join(directory, "controller"),
    databaseUrl: database.url,
    env: { PALEBLUEDOT_TELEMETRY_INTERVAL_MS: "1000", ...options.env },
  });
  const platform: TestPlatform = {
    directory,
    database,
    controller,
    get admin() {
      return platform.controller.api;
    },
    async tenant(name) {
      const tenant = await platform.admin.post("/api/v1/tenants", { name });
      const token = await platform.admin.post(`/api/v1/tenants/${tenant.id}/tokens`, { name: "test" });
      return { id: tenant.id, api: createApi(platform.controller.url, token.token) };
    },
    async joinToken(body = {}) {
      const created = await platform.admin.post("/api/v1/join-tokens", {
        name: "test",
        auto_approve: true,
        max_uses: 100,
        ...body,
      });
      return created.token;
    },
    async addHost({ name, model, count, env, enrolmentEndpoint }) {
      seed += 1;
      const server = createSimulatedServer({
        dir: join(directory, name),
        model,
        count,
        hostname: name,
        seed,
        speed: 20,
        sysfs: true,
      });
      const agent = startAgent({
        dataDir: join(directory, `${name}-agent`),
        controller: enrolmentEndpoint ?? platform.controller.enrolmentEndpoint,
        caFingerprint: platform.controller.caFingerprint,
        joinToken: await platform.joinToken(),
        env: { ...server.env, PALEBLUEDOT_TELEMETRY_INTERVAL_MS: "1000", ...env(server) },
      });
      const found: Json = await eventually(
        `${name} is available`,
        async () => {
          if (!agent.isRunning()) throw new Error(`the agent ended:\n${agent.logTail()}`);
          const { items } = await platform.admin.get("/api/v1/servers?state=available&limit=500");
          return items.find((item: Json) => item.name === name);
        },
        { timeoutMs: 60_000 },
      ).catch((error: unknown) => {
        throw new Error(`${name} did not become available:\n${agent.logTail()}`, { cause: error });
      });
      const host: TestHost = { server, agent, serverId: found.id };
      endings.push(async () => {
        await host.agent.kill();
      });
      return host;
    },
    defer: (end) => void endings.push(end),
    async [Symbol.asyncDispose]() {
      for (const end of endings.toReversed()) await end();
      await platform.controller.stop();
      await database.close();
      rmSync(directory, { recursive: true, force: true, maxRetries: 5, retryDelay: 200 });
    },
  };
  return platform;
}

/** Until the allocation is in that state; fails at once when it ended instead. */
export function untilState(api: Api, id: string, state: string, timeoutMs = 60_000): Promise<Json> {
  return eventually(
    `allocation ${id} is ${state}`,
    async () => {
      const seen = await api.get(`/api/v1/allocations/${id}`);
      if (seen.state === state) return seen;
      if (seen.state === "ended")
        return Promise.reject(new Error(`ended (${seen.end_reason}): ${seen.message}`));
      return undefined;
    },
    { timeoutMs },
  );
}
