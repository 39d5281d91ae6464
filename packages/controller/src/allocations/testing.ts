import { randomUUID } from "node:crypto";
import { allocationRequestSchema, type AllocationRequest } from "@palebluedot/shared/allocation-request.ts";
import { systemClock, type Clock } from "@palebluedot/shared/clock.ts";
import {
  WorkloadDesired_Target,
  WorkloadObserved_Phase,
  type DesiredState,
  type WorkloadObserved,
} from "@palebluedot/shared/generated/palebluedot/agent/v1/agent.ts";
import { createLogger } from "@palebluedot/shared/logger.ts";
import { createSecretBox } from "@palebluedot/shared/secret-box.ts";
import { Registry } from "prom-client";
import type { Sql } from "postgres";
import { uuidv7 } from "uuidv7";
import { createNotifications } from "../db/notifications.ts";
import { createFailpoints } from "../reconciler/failpoints.ts";
import type { Leadership } from "../reconciler/leadership.ts";
import { createAllocationFeature, type AllocationFeature, type AllocationFeatureOptions } from "./feature.ts";
import type { AllocationAgentPort } from "./types.ts";

/** Support for tests of allocations: a fleet in the database, the feature, and agents that keep state. */

export interface SeededServer {
  readonly id: string;
  readonly gpus: readonly { readonly id: string; readonly uuid: string }[];
}

export async function seedTenant(sql: Sql, name = `tenant-${randomUUID().slice(0, 8)}`): Promise<string> {
  const id = uuidv7();
  await sql`insert into tenants (id, name) values (${id}, ${name})`;
  return id;
}

/** Available container hosts in one statement each for servers and GPUs. */
/** No agent of a seeded server ever connected. */
export const seededSessionEpoch = 0;

export async function seedServers(
  sql: Sql,
  options: {
    readonly count: number;
    readonly gpus: number;
    readonly model?: string;
    readonly memoryBytes?: number;
    readonly labels?: Readonly<Record<string, string>>;
  },
): Promise<SeededServer[]> {
  const servers = Array.from({ length: options.count }, () => ({
    id: uuidv7(),
    gpus: Array.from({ length: options.gpus }, () => ({ id: uuidv7(), uuid: `GPU-${randomUUID()}` })),
  }));
  const rows = JSON.stringify(servers.map(({ id }) => ({ id, name: `server-${id}` })));
  await sql`
    insert into servers (id, name, state, labels)
    select id, name, 'available', ${JSON.stringify(options.labels ?? {})}::text::jsonb
    from jsonb_to_recordset(${rows}::text::jsonb) as row(id uuid, name text)`;
  const gpuRows = JSON.stringify(
    servers.flatMap(({ id, gpus }) => gpus.map((gpu, index) => ({ ...gpu, server_id: id, index }))),
  );
  await sql`
    insert into gpus (id, server_id, uuid, index, model, pci_bus_id, memory_bytes, inventory, health, mig_enabled)
    select id, server_id, uuid, index, ${options.model ?? "NVIDIA H100 80GB HBM3"},
      '00000000:' || lpad(to_hex(index), 2, '0') || ':00.0', ${options.memoryBytes ?? 85_520_809_984}, '{}',
      'healthy', false
    from jsonb_to_recordset(${gpuRows}::text::jsonb) as row(id uuid, server_id uuid, uuid text, index integer)`;
  return servers;
}

export function testRequest(
  gpus: Partial<AllocationRequest["gpus"]> = {},
  more: Readonly<Record<string, unknown>> = {},
): AllocationRequest {
  return allocationRequestSchema.parse({
    gpus: { count: 1, ...gpus },
    container: { image: "busybox" },
    ...more,
  });
}

/** Leads always: two of them at once are what the constraints are for. */
export const alwaysLeading: Leadership = {
  current: () => ({ token: 1, signal: neverAborted }),
  onTerm: (listener) => {
    listener({ token: 1, signal: neverAborted });
    return () => undefined;
  },
  start: () => undefined,
  stop: () => Promise.resolve(),
};
const neverAborted = new AbortController().signal;

export interface TestFeature extends AllocationFeature {
  /** Server ids passed to desiredStateChanged, in order. */
  readonly pushed: string[];
  readonly metrics: Registry;
  close(): Promise<void>;
}

const secretKey = Buffer.alloc(32, 7);

export function createTestFeature(
  sql: Sql,
  options: Partial<AllocationFeatureOptions> & { readonly clock?: Clock; readonly logLevel?: string } = {},
): TestFeature {
  const pushed: string[] = [];
  const log = createLogger({ name: "test", level: options.logLevel ?? "silent" });
  const notifications = createNotifications(sql, { log });
  const metrics = new Registry();
  const feature = createAllocationFeature(
    {
      sql,
      clock: options.clock ?? systemClock,
      log,
      failpoints: createFailpoints(undefined),
      secrets: createSecretBox(secretKey),
      notifications,
      metrics,
      replicaId: randomUUID(),
    },
    {
      desiredStateChanged: (ids) => pushed.push(...ids),
      isConnectedHere: () => true,
      leadership: alwaysLeading,
      ...options,
    },
  );
  return {
    ...feature,
    pushed,
    metrics,
    async close() {
      await feature.stop();
      await notifications.close();
    },
  };
}

export function workloadReport(
  allocationId: string,
  phase: WorkloadObserved_Phase,
  more: Partial<WorkloadObserved> = {},
): WorkloadObserved {
  return {
    allocationId,
    phase,
    reason: "",
    message: "",
    containerId: "",
    startedAtUnixMs: 0,
    restartCount: 0,
    ports: [],
    holders: [],
    oomKilled: false,
    ...more,
  };
}

/** An agent that does at once what its document says, and remembers what runs and what was cleaned. */
export interface TestAgent {
  readonly running: Map<string, readonly string[]>;
  readonly cleaned: Set<string>;
  /** Fetches the document, converges and reports. Returns the document. */
  sync(port: AllocationAgentPort): Promise<DesiredState | undefined>;
}

export function createTestAgent(serverId: string): TestAgent {
  const running = new Map<string, readonly string[]>();
  const cleaned = new Set<string>();
  return {
    running,
    cleaned,
    async sync(port) {
      const document = (await port.loadDesiredStates([serverId])).get(serverId);
      if (document === undefined) return undefined;
      const workloads = document.workloads.map((workload) => {
        if (workload.target === WorkloadDesired_Target.RECLAIMED) {
          running.delete(workload.allocationId);
          cleaned.add(workload.allocationId);
          return workloadReport(workload.allocationId, WorkloadObserved_Phase.CLEAN);
        }
        for (const [other, gpus] of running) {
          const shared = gpus.find((gpu) => workload.gpuUuids.includes(gpu));
          if (other !== workload.allocationId && shared !== undefined) {
            throw new Error(`${shared} is wanted for ${workload.allocationId} while ${other} runs on it`);
          }
        }
        running.set(workload.allocationId, workload.gpuUuids);
        return workloadReport(workload.allocationId, WorkloadObserved_Phase.RUNNING, {
          containerId: `container-${workload.allocationId}`,
        });
      });
      await port.observe(
        serverId,
        {
          incarnation: document.incarnation,
          generation: document.generation,
          workloads,
          conditions: [],
        },
        seededSessionEpoch,
      );
      return document;
    },
  };
}
