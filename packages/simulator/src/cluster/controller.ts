import { existsSync, mkdirSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { nodeFlags } from "@palebluedot/shared/node-flags.ts";
import { z } from "zod";
import { createApi, type Api } from "./api.ts";
import { eventually } from "./eventually.ts";
import { startPart, type RunningProcess } from "./process.ts";

/** What the controller writes to its data directory once its listeners are up. */
const controllerFileSchema = z.object({
  pid: z.number(),
  http_port: z.number(),
  enrolment_port: z.number(),
  agent_port: z.number(),
  ca_fingerprint: z.string(),
});

export interface ControllerProcess extends RunningProcess {
  readonly api: Api;
  readonly adminToken: string;
  readonly url: string;
  readonly enrolmentEndpoint: string;
  readonly caFingerprint: string;
  readonly dataDir: string;
  /** Starts the controller again on the same data and the same ports, after kill() or stop(). */
  restart(env?: Readonly<Record<string, string>>): Promise<ControllerProcess>;
}

export interface ControllerOptions {
  readonly dataDir: string;
  /** Absent: embedded PostgreSQL. */
  readonly databaseUrl?: string;
  readonly env?: Readonly<Record<string, string>>;
  readonly ports?: { readonly http: number; readonly enrolment: number; readonly agent: number };
  readonly startTimeoutMs?: number;
}

/** Starts a real controller on loopback and waits until it is ready. */
export async function startController(options: ControllerOptions): Promise<ControllerProcess> {
  mkdirSync(options.dataDir, { recursive: true, mode: 0o755 });
  const file = join(options.dataDir, "controller.json");
  const env: Record<string, string> = {
    SERVER_HOST: "127.0.0.1",
    SERVER_PORT: String(options.ports?.http ?? 0),
    PALEBLUEDOT_AGENT_HOST: "127.0.0.1",
    PALEBLUEDOT_ENROLMENT_PORT: String(options.ports?.enrolment ?? 0),
    PALEBLUEDOT_AGENT_PORT: String(options.ports?.agent ?? 0),
    PALEBLUEDOT_DATA_DIR: options.dataDir,
    ...(options.databaseUrl === undefined ? {} : { DATABASE_URL: options.databaseUrl }),
    ...options.env,
  };
  const running = startPart("controller", ["run"], {
    env,
    logFile: join(options.dataDir, "controller.log"),
    nodeFlags: nodeFlags.controller,
  });
  const ready = await eventually(
    "the controller is ready",
    async () => {
      if (!running.isRunning()) return { failed: true as const };
      if (!existsSync(file)) return undefined;
      const facts = controllerFileSchema.parse(JSON.parse(readFileSync(file, "utf8")));
      if (facts.pid !== running.pid) return undefined;
      const response = await fetch(`http://127.0.0.1:${facts.http_port}/readyz`, {
        signal: AbortSignal.timeout(5000),
      });
      return response.ok ? { failed: false as const, facts } : undefined;
    },
    { timeoutMs: options.startTimeoutMs ?? 60_000, intervalMs: 20 },
  ).catch(async (error: unknown) => {
    await running.kill();
    throw new Error(`the controller did not become ready:\n${running.logTail()}`, { cause: error });
  });
  if (ready.failed) throw new Error(`the controller ended while it started:\n${running.logTail()}`);
  const { facts } = ready;
  const url = `http://127.0.0.1:${facts.http_port}`;
  const adminToken = readFileSync(join(options.dataDir, "admin-token"), "utf8").trim();
  return {
    ...running,
    api: createApi(url, adminToken),
    adminToken,
    url,
    enrolmentEndpoint: `127.0.0.1:${facts.enrolment_port}`,
    caFingerprint: facts.ca_fingerprint,
    dataDir: options.dataDir,
    restart: (extraEnv) =>
      startController({
        ...options,
        env: extraEnv ?? options.env ?? {},
        ports: { http: facts.http_port, enrolment: facts.enrolment_port, agent: facts.agent_port },
      }),
  };
}
