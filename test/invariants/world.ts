import {
  WorkloadDesired_Target,
  WorkloadObserved_Phase,
  type DesiredState,
  type ObservedState,
  type WorkloadObserved,
} from "@palebluedot/shared/generated/palebluedot/agent/v1/agent.ts";
import { systemClock, type Clock } from "@palebluedot/shared/clock.ts";
import { isPlatformError } from "@palebluedot/shared/errors.ts";
import {
  createTestFeature,
  seededSessionEpoch,
  seedServers,
  seedTenant,
  testRequest,
  workloadReport,
  type SeededServer,
  type TestFeature,
} from "@palebluedot/controller/allocations/testing.ts";
import type { AllocationCaller } from "@palebluedot/controller/allocations/types.ts";
import { connect, databaseErrorCode, isTransientDatabaseError } from "@palebluedot/controller/db/connect.ts";
import type { Sql } from "postgres";
import { wronglyWaiting, type FreeServer } from "./waiting.ts";

/** One thing that somebody does, through one of four controllers with one connection each. */
export type Operation = { readonly lane: number } & (
  | {
      readonly kind: "create";
      readonly count: number;
      readonly key: number | undefined;
      readonly priority: number;
    }
  | { readonly kind: "release"; readonly pick: number }
  | { readonly kind: "extend"; readonly pick: number; readonly seconds: number }
  | { readonly kind: "schedule" }
  | { readonly kind: "reconcile" }
  | { readonly kind: "time"; readonly seconds: number }
  | { readonly kind: "agent"; readonly server: number; readonly mood: AgentMood }
  | { readonly kind: "late-report"; readonly pick: number }
  | {
      readonly kind: "server";
      readonly server: number;
      readonly change: "lost" | "found" | "drain" | "undrain";
    }
  | { readonly kind: "restart" }
);

export type AgentMood = "works" | "fails" | "exits" | "dirty" | "slow" | "lies" | "keeps-report";

export const laneCount = 4;
const serverCount = 3;
const gpusPerServer = 4;
const leaseSeconds = 600;

/** What one agent has on its server. It survives controllers, and it is what a tenant would see. */
interface AgentMemory {
  readonly running: Map<string, readonly string[]>;
  readonly cleaned: Set<string>;
  readonly documents: Map<number, string>;
  generation: number;
  /** One agent does one thing at a time. */
  turn: Promise<void>;
}

interface KeyUse {
  readonly body: number;
  /** Undefined: refused because the key was used for another body. */
  readonly id: string | undefined;
}

/** Four controllers that all believe they lead, three servers with agents, and an adversarial outside. */
export class World {
  readonly violations: string[] = [];
  #now = Date.parse("2026-11-01T00:00:00Z");
  readonly #clock: Clock = { ...systemClock, now: () => this.#now };
  readonly #sql: { database: Sql };
  readonly #lanes: { sql: Sql; feature: TestFeature }[] = [];
  readonly #agents = new Map<string, AgentMemory>();
  readonly #kept: { serverId: string; report: ObservedState }[] = [];
  readonly #accepted = new Set<string>();
  readonly #keyUses = new Map<number, KeyUse[]>();
  readonly #retries: { key: number; count: number; priority: number }[] = [];
  #servers: readonly SeededServer[] = [];
  #caller: AllocationCaller = { tenantId: undefined, actor: "token:test" };

  private constructor(database: Sql) {
    this.#sql = { database };
  }

  static async create(admin: Sql, url: string): Promise<World> {
    const world = new World(admin);
    await admin.unsafe(`
      delete from idempotency_keys; delete from claims; delete from allocations; delete from reconcile_queue;
      delete from outbox; delete from gpus; delete from servers; delete from tenants`);
    world.#caller = { tenantId: await seedTenant(admin), actor: "token:test" };
    world.#servers = await seedServers(admin, { count: serverCount, gpus: gpusPerServer });
    for (const server of world.#servers) {
      world.#agents.set(server.id, {
        running: new Map(),
        cleaned: new Set(),
        documents: new Map(),
        generation: 0,
        turn: Promise.resolve(),
      });
    }
    for (let lane = 0; lane < laneCount; lane += 1) {
      const sql = connect(url, { maxConnections: 1, applicationName: `lane-${lane}` });
      world.#lanes.push({ sql, feature: createTestFeature(sql, { clock: world.#clock }) });
    }
    return world;
  }

  async close(): Promise<void> {
    for (const lane of this.#lanes) {
      await lane.feature.close();
      await lane.sql.end({ timeout: 1 });
    }
  }

  /** Runs the operations, each lane its own one after the other, the lanes side by side. */
  async run(operations: readonly Operation[]): Promise<void> {
    const perLane = Array.from({ length: laneCount }, (_, lane) =>
      operations.filter((operation) => operation.lane === lane),
    );
    await Promise.all(
      perLane.map(async (own) => {
        for (const operation of own) await this.#attempt(operation);
      }),
    );
  }

  async #attempt(operation: Operation): Promise<void> {
    try {
      await this.#perform(operation);
    } catch (error) {
      // A killed connection loses the answer, never what was promised; anything else is a fault.
      if (isTransientDatabaseError(error)) {
        if (operation.kind === "create" && operation.key !== undefined) {
          this.#retries.push({ key: operation.key, count: operation.count, priority: operation.priority });
        }
        return;
      }
      const code = isPlatformError(error) ? error.code : databaseErrorCode(error);
      this.violations.push(`${JSON.stringify(operation)} failed: ${code ?? ""} ${String(error)}`);
    }
  }

  async #perform(operation: Operation): Promise<void> {
    const lane = this.#lane(operation.lane);
    const { feature } = lane;
    switch (operation.kind) {
      case "create":
        await this.#createOn(feature, operation);
        return;
      case "release": {
        const id = this.#pick(operation.pick);
        if (id !== undefined) await feature.service.release(this.#caller, id);
        return;
      }
      case "extend": {
        const id = this.#pick(operation.pick);
        if (id === undefined) return;
        await feature.service.extend(this.#caller, id, operation.seconds).catch((error: unknown) => {
          if (!isPlatformError(error) || error.code !== "allocation-not-live") throw error;
        });
        return;
      }
      case "schedule":
        await feature.scheduler.runOnce();
        return;
      case "reconcile":
        await feature.reconciler.runOnce();
        return;
      case "time":
        this.#now += operation.seconds * 1000;
        return;
      case "agent":
        await this.#agentTurn(this.#server(operation.server).id, feature, operation.mood);
        return;
      case "late-report": {
        const kept = this.#kept[operation.pick % Math.max(1, this.#kept.length)];
        if (kept !== undefined)
          await feature.agentPort.observe(kept.serverId, kept.report, seededSessionEpoch);
        return;
      }
      case "server":
        await this.#changeServer(this.#server(operation.server).id, operation.change, feature);
        return;
      case "restart":
        await this.#restart(operation.lane);
        return;
      default: {
        const never: never = operation;
        throw new Error(`unknown operation ${JSON.stringify(never)}`);
      }
    }
  }

  #lane(index: number): { sql: Sql; feature: TestFeature } {
    const lane = this.#lanes[index % laneCount];
    if (lane === undefined) throw new Error("no such lane");
    return lane;
  }

  #server(index: number): SeededServer {
    const server = this.#servers[index % this.#servers.length];
    if (server === undefined) throw new Error("no such server");
    return server;
  }

  #pick(index: number): string | undefined {
    const ids = [...this.#accepted];
    return ids[index % Math.max(1, ids.length)];
  }

  async #createOn(
    feature: TestFeature,
    create: { readonly count: number; readonly key: number | undefined; readonly priority: number },
  ): Promise<void> {
    const request = testRequest(
      { count: create.count },
      { lease_seconds: leaseSeconds, priority: create.priority },
    );
    const body = create.count * 1000 + create.priority;
    const idempotencyKey = create.key === undefined ? undefined : `key-${create.key}`;
    let id: string | undefined;
    try {
      const { allocation } = await feature.service.create(this.#caller, request, { idempotencyKey });
      id = allocation.id;
      this.#accepted.add(id);
    } catch (error) {
      if (!isPlatformError(error) || error.code !== "idempotency-key-reused") throw error;
    }
    if (create.key === undefined) return;
    const uses = this.#keyUses.get(create.key) ?? [];
    uses.push({ body, id });
    this.#keyUses.set(create.key, uses);
  }

  /** The connection is cut in the middle of whatever it does, and the memory is lost. */
  async #restart(index: number): Promise<void> {
    const lane = this.#lane(index);
    await this.#sql.database`
      select pg_terminate_backend(pid) from pg_stat_activity
      where application_name = ${`lane-${(index + 1) % laneCount}`} and datname = current_database()`;
    lane.feature = createTestFeature(lane.sql, { clock: this.#clock });
  }

  async #changeServer(
    serverId: string,
    change: "lost" | "found" | "drain" | "undrain",
    feature: TestFeature,
  ): Promise<void> {
    const conditions = change === "lost" ? '{"unreachable": {"status": "failed"}}' : "{}";
    if (change === "lost" || change === "found") {
      await this.#sql
        .database`update servers set conditions = ${conditions}::text::jsonb where id = ${serverId}`;
    } else {
      await this.#sql.database`update servers set draining = ${change === "drain"} where id = ${serverId}`;
    }
    feature.agentPort.capacityChanged([serverId]);
  }

  // ---- agents ---------------------------------------------------------------------------------

  #agentTurn(serverId: string, feature: TestFeature, mood: AgentMood): Promise<void> {
    const agent = this.#agents.get(serverId);
    if (agent === undefined) throw new Error("no such agent");
    const takeTurn = async (): Promise<void> => {
      const document = (await feature.agentPort.loadDesiredStates([serverId])).get(serverId);
      if (document === undefined) return;
      this.#checkDocument(serverId, agent, document);
      const report = this.#converge(agent, document, mood);
      if (mood === "keeps-report") this.#kept.push({ serverId, report });
      else await feature.agentPort.observe(serverId, report, seededSessionEpoch);
    };
    const turn = agent.turn.then(takeTurn);
    agent.turn = turn.catch(() => undefined);
    return turn;
  }

  #checkDocument(serverId: string, agent: AgentMemory, document: DesiredState): void {
    if (document.generation < agent.generation) {
      this.violations.push(
        `server ${serverId}: generation fell from ${agent.generation} to ${document.generation}`,
      );
    }
    agent.generation = document.generation;
    const content = JSON.stringify(
      document.workloads.map((workload) => [workload.allocationId, workload.target, workload.gpuUuids]),
    );
    const known = agent.documents.get(document.generation);
    if (known !== undefined && known !== content) {
      this.violations.push(
        `server ${serverId}: generation ${document.generation} means ${known} and ${content}`,
      );
    }
    agent.documents.set(document.generation, content);
    const wanted = new Set(document.workloads.map((workload) => workload.allocationId));
    for (const id of agent.running.keys()) {
      if (!wanted.has(id)) this.violations.push(`allocation ${id} left the document while it still runs`);
    }
  }

  #converge(agent: AgentMemory, document: DesiredState, mood: AgentMood): ObservedState {
    const workloads: WorkloadObserved[] = [];
    for (const workload of document.workloads) {
      const { allocationId: id, gpuUuids } = workload;
      if (workload.target === WorkloadDesired_Target.RECLAIMED) {
        if (mood === "dirty") {
          workloads.push(workloadReport(id, WorkloadObserved_Phase.DIRTY, { reason: "gpu-memory-in-use" }));
          continue;
        }
        if (mood === "slow") continue;
        agent.running.delete(id);
        agent.cleaned.add(id);
        workloads.push(workloadReport(id, WorkloadObserved_Phase.CLEAN));
        continue;
      }
      if (mood === "slow") {
        workloads.push(workloadReport(id, WorkloadObserved_Phase.PULLING));
        continue;
      }
      for (const [other, gpus] of agent.running) {
        if (other !== id && gpus.some((gpu) => gpuUuids.includes(gpu))) {
          this.violations.push(`${id} is to start on a GPU that ${other} still has`);
        }
      }
      agent.running.set(id, gpuUuids);
      if (mood === "fails") workloads.push(workloadReport(id, WorkloadObserved_Phase.FAILED));
      else if (mood === "exits")
        workloads.push(workloadReport(id, WorkloadObserved_Phase.EXITED, { exitCode: 0 }));
      else workloads.push(workloadReport(id, WorkloadObserved_Phase.RUNNING));
    }
    if (mood === "lies") {
      for (const id of this.#accepted) {
        const here = document.workloads.some((workload) => workload.allocationId === id);
        if (here) continue;
        workloads.push(workloadReport(id, WorkloadObserved_Phase.CLEAN));
        // By the time the report arrives the allocation may have come to this very server and been given back:
        // then the word of the host about its own GPUs is all there is. Of another's it must count for nothing.
        agent.cleaned.add(id);
      }
    }
    return {
      incarnation: document.incarnation,
      generation: document.generation,
      workloads,
      conditions: [],
    };
  }

  // ---- what must hold -------------------------------------------------------------------------

  /** Invariants that need more than the database: what was promised, and what agents saw. */
  async checkPromises(): Promise<void> {
    const rows = await this.#sql.database<
      { id: string; state: string; server_id: string | null; claims: number }[]
    >`
      select id, state, server_id, (select count(*)::int from claims where allocation_id = allocations.id) as claims
      from allocations`;
    const known = new Map(rows.map((row) => [row.id, row]));
    for (const id of this.#accepted) {
      if (!known.has(id)) this.violations.push(`accepted allocation ${id} is lost`);
    }
    for (const row of rows) {
      if (row.state !== "ended" || row.claims === 0) continue;
      const cleaned = this.#agents.get(row.server_id ?? "")?.cleaned.has(row.id) === true;
      if (!cleaned) this.violations.push(`allocation ${row.id} ended before its server was clean`);
    }
    for (const [key, uses] of this.#keyUses) {
      const done = uses.filter((use) => use.id !== undefined);
      const ids = new Set(done.map((use) => use.id));
      const bodies = new Set(done.map((use) => use.body));
      if (ids.size > 1 || bodies.size > 1) {
        this.violations.push(`key ${key} was done more than once: ${JSON.stringify(uses)}`);
      }
    }
  }

  /** Who lost an answer asks again with the same key. */
  async retryLostAnswers(): Promise<void> {
    for (const retry of this.#retries.splice(0)) {
      await persist(() => this.#createOn(this.#lane(0).feature, retry));
    }
  }

  /** Everything recovers; nothing that fits may keep waiting. */
  async settle(): Promise<void> {
    await this.#sql.database`update servers set conditions = '{}', draining = false`;
    await this.#agentsConverge();
    const { feature } = this.#lane(0);
    feature.agentPort.capacityChanged(this.#servers.map((server) => server.id));
    await persist(() => feature.scheduler.runOnce());
    const waiting = await this.#sql.database<
      { id: string; priority: number; created_at: Date; count: number }[]
    >`
      select id, priority, created_at, (request -> 'gpus' ->> 'count')::int as count
      from allocations where state = 'queued'`;
    const servers = await this.#sql.database<FreeServer[]>`
      select server_id as id, count(*)::int as gpus, count(*) filter (where not exists (
        select from claims where claims.gpu_id = gpus.id and released_at is null))::int as free
      from gpus group by server_id`;
    const requests = waiting.map(({ created_at, ...row }) => ({ ...row, createdAt: created_at.getTime() }));
    this.violations.push(...wronglyWaiting(requests, servers, this.#now));
  }

  /** Everything is released: nothing may stay behind. */
  async drainAll(): Promise<void> {
    const { feature } = this.#lane(1);
    for (const id of this.#accepted) await persist(() => feature.service.release(this.#caller, id));
    await this.#agentsConverge();
    const rest = await this.#sql.database`select id, state from allocations where state <> 'ended'`;
    if (rest.length > 0) this.violations.push(`still there after all was released: ${JSON.stringify(rest)}`);
    const claims = await this.#sql.database`select id from claims where released_at is null`;
    if (claims.length > 0) this.violations.push(`leaked claims: ${JSON.stringify(claims)}`);
    for (const [serverId, agent] of this.#agents) {
      if (agent.running.size > 0)
        this.violations.push(`server ${serverId} still runs ${[...agent.running.keys()].join()}`);
    }
  }

  async #agentsConverge(): Promise<void> {
    for (let round = 0; round < 3; round += 1) {
      for (const server of this.#servers) {
        await persist(() => this.#agentTurn(server.id, this.#lane(2).feature, "works"));
      }
    }
  }
}

/** A connection that was cut shows itself at the next use: whoever needs an answer asks again. */
async function persist<T>(run: () => Promise<T>): Promise<T> {
  for (let attempt = 0; ; attempt += 1) {
    try {
      return await run();
    } catch (error) {
      if (attempt >= 5 || !isTransientDatabaseError(error)) throw error;
    }
  }
}
