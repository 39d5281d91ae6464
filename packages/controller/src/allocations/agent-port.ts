import { createHash } from "node:crypto";
import type { ObservedWorkload } from "@palebluedot/shared/allocation-request.ts";
import type { Clock } from "@palebluedot/shared/clock.ts";
import type { ObservedState } from "@palebluedot/shared/generated/palebluedot/agent/v1/agent.ts";
import type { Logger } from "@palebluedot/shared/logger.ts";
import type { SecretBox } from "@palebluedot/shared/secret-box.ts";
import type { AllocationState } from "@palebluedot/shared/vocabulary.ts";
import type { Sql } from "postgres";
import { appendEvents } from "../events/outbox.ts";
import type { NewEvent } from "../events/types.ts";
import type { Failpoints } from "../reconciler/failpoints.ts";
import { createBatcher } from "./batching.ts";
import { loadDesiredStates } from "./desired-state.ts";
import type { AllocationMetrics } from "./metrics.ts";
import { judgeReport } from "./observation.ts";
import {
  retryDeadlocks,
  type ReachedGeneration,
  type Transition,
  type Transitioned,
  type TransitionWriter,
} from "./transitions.ts";
import type { AllocationAgentPort } from "./types.ts";

export interface AgentPortOptions {
  readonly sql: Sql;
  readonly clock: Clock;
  readonly log: Logger;
  readonly secrets: SecretBox;
  readonly failpoints: Failpoints;
  readonly metrics: AllocationMetrics;
  readonly writer: TransitionWriter;
  readonly onTransitioned: (done: readonly Transitioned[]) => void;
  readonly capacityChanged: (serverIds: readonly string[]) => void;
}

interface Report {
  readonly serverId: string;
  readonly observed: ObservedState;
  readonly epoch: number;
}

interface LiveRow {
  id: string;
  tenant_id: string;
  server_id: string;
  state: AllocationState;
  observed: ObservedWorkload;
  message: string;
  output_tail_md5: string | null;
}

interface Changes {
  readonly transitions: Transition[];
  readonly observations: {
    id: string;
    serverId: string;
    observed: ObservedWorkload;
    message: string | null;
  }[];
  readonly tails: { id: string; serverId: string; output_tail: string }[];
  readonly generations: ReachedGeneration[];
  readonly events: NewEvent[];
}

/** Not a secret's digest: it only spares writing again what is there. */
const md5 = (data: Uint8Array): string => createHash("md5").update(data).digest("hex");

/** The changes of these servers. */
function only(changes: Changes, serverIds: ReadonlySet<string>): Changes {
  const of = <Change extends { readonly serverId?: string | null }>(list: readonly Change[]): Change[] =>
    list.filter(({ serverId }) => typeof serverId === "string" && serverIds.has(serverId));
  return {
    transitions: of(changes.transitions),
    observations: of(changes.observations),
    tails: of(changes.tails),
    events: of(changes.events),
    generations: changes.generations.filter((reached) => serverIds.has(reached.id)),
  };
}

export function createAgentPort(options: AgentPortOptions): AllocationAgentPort {
  const { sql, clock, log, writer, metrics } = options;

  const reports = createBatcher<Report, void>({
    maxBatch: 256,
    // One after the other: a server's later report must not overtake its earlier one.
    concurrency: 1,
    run: async (batch) => {
      await retryDeadlocks(() => apply(batch), log);
      return batch.map(() => undefined);
    },
  });

  async function apply(batch: readonly Report[]): Promise<void> {
    // The newest picture of a server replaces the ones before it; a session that was fenced is never newer.
    const newest = new Map<string, Report>();
    for (const report of batch) {
      if (report.epoch >= (newest.get(report.serverId)?.epoch ?? 0)) newest.set(report.serverId, report);
    }
    const serverIds = [...newest.keys()];
    const [servers, rows] = await Promise.all([
      sql<
        {
          id: string;
          incarnation: string;
          desired_generation: number;
          observed_generation: number;
          session_epoch: number;
        }[]
      >`
        select id, (select incarnation from installation) as incarnation, desired_generation, observed_generation,
          session_epoch::float8 as session_epoch
        from servers where id = any(${serverIds}::uuid[])`,
      sql<LiveRow[]>`
        select id, tenant_id, server_id, state, observed, message, md5(output_tail) as output_tail_md5
        from allocations
        where server_id = any(${serverIds}::uuid[]) and state in ('scheduled', 'provisioning', 'active', 'releasing')`,
    ]);
    const live = new Map(rows.map((row) => [row.id, row]));
    const changes: Changes = { transitions: [], observations: [], tails: [], generations: [], events: [] };
    for (const server of servers) {
      const report = newest.get(server.id);
      if (report === undefined) continue;
      const { observed } = report;
      if (report.epoch !== server.session_epoch) {
        metrics.droppedReports.inc({ reason: "fenced" }, observed.workloads.length);
        continue;
      }
      if (observed.incarnation !== server.incarnation) {
        // Computed against another history of this database: what it calls clean may be in use in this one.
        metrics.droppedReports.inc({ reason: "incarnation" }, observed.workloads.length);
        continue;
      }
      const generation = Math.min(observed.generation, server.desired_generation);
      if (generation > server.observed_generation) changes.generations.push({ id: server.id, generation });
      collect(server.id, observed, live, changes);
    }
    const done = await write(changes, newest);
    if (done.some((change) => change.to === "active")) options.failpoints.hit("allocation-activated");
    writer.committed(done);
    options.onTransitioned(done);
  }

  function collect(
    serverId: string,
    observed: ObservedState,
    live: ReadonlyMap<string, LiveRow>,
    changes: Changes,
  ): void {
    const seen = new Set<string>();
    for (const workload of observed.workloads) {
      const row = live.get(workload.allocationId);
      // Ended allocations linger in pictures for a moment; those of other servers are a lie.
      if (row === undefined || row.server_id !== serverId) {
        metrics.droppedReports.inc({ reason: "not-on-this-server" });
        continue;
      }
      if (seen.has(row.id)) {
        metrics.droppedReports.inc({ reason: "repeated" });
        continue;
      }
      seen.add(row.id);
      const verdict = judgeReport(
        { id: row.id, serverId, state: row.state, observed: row.observed, message: row.message },
        workload,
      );
      if (verdict.transition !== undefined) changes.transitions.push(verdict.transition);
      if (verdict.observed !== undefined) {
        changes.observations.push({
          id: row.id,
          serverId,
          observed: verdict.observed,
          message: verdict.message ?? null,
        });
      }
      // Every picture carries it again.
      if (verdict.outputTail !== undefined && md5(verdict.outputTail) !== row.output_tail_md5) {
        changes.tails.push({ id: row.id, serverId, output_tail: verdict.outputTail.toString("base64") });
      }
      if (verdict.dirty !== undefined) {
        changes.events.push({
          type: "allocation.dirty",
          severity: "warning",
          tenantId: row.tenant_id,
          serverId,
          allocationId: row.id,
          actor: `agent:${serverId}`,
          message: verdict.dirty,
          occurredAt: new Date(clock.now()),
        });
      }
    }
  }

  async function write(
    collected: Changes,
    reports: ReadonlyMap<string, Report>,
  ): Promise<readonly Transitioned[]> {
    const now = clock.now();
    const touched = [
      ...new Set([
        ...[
          ...collected.transitions,
          ...collected.observations,
          ...collected.tails,
          ...collected.events,
        ].flatMap(({ serverId }) => serverId ?? []),
        ...collected.generations.map((reached) => reached.id),
      ]),
    ];
    if (touched.length === 0) return [];
    return sql.begin(async (tx) => {
      // A session that starts now waits for this transaction, or this transaction sees its epoch.
      const epochs = touched.map((id) => reports.get(id)?.epoch ?? -1);
      const held = await tx<{ id: string }[]>`
        with input as materialized (
          select * from unnest(${touched}::uuid[], ${epochs}::bigint[]) as input(id, epoch)
        )
        select servers.id from servers join input on input.id = servers.id
        where servers.session_epoch = input.epoch order by servers.id for no key update of servers`;
      const changes = only(collected, new Set(held.map((row) => row.id)));
      const done = await writer.write(tx, changes.transitions, now, changes.generations);
      if (changes.observations.length > 0) {
        await tx`
          with input as materialized (
            select * from jsonb_to_recordset(${JSON.stringify(changes.observations)}::text::jsonb)
              as input(id uuid, observed jsonb, message text)
          ), held as materialized (
            select id from allocations where id in (select id from input) order by id for no key update
          )
          update allocations allocation
          set observed = input.observed, message = coalesce(input.message, allocation.message)
          from input join held on held.id = input.id
          where allocation.id = input.id and allocation.state <> 'ended'`;
      }
      if (changes.tails.length > 0) {
        await tx`
          with input as materialized (
            select * from jsonb_to_recordset(${JSON.stringify(changes.tails)}::text::jsonb)
              as input(id uuid, output_tail text)
          ), held as materialized (
            select id from allocations where id in (select id from input) order by id for no key update
          )
          update allocations allocation set output_tail = decode(input.output_tail, 'base64')
          from input join held on held.id = input.id where allocation.id = input.id`;
      }
      await appendEvents(tx, changes.events);
      return done;
    });
  }

  return {
    async loadDesiredStates(serverIds) {
      const documents = await loadDesiredStates({ sql, secrets: options.secrets, log }, serverIds);
      if (documents.size > 0) options.failpoints.hit("desired-state-loaded");
      return documents;
    },
    async observe(serverId, observed, epoch) {
      options.failpoints.hit("observation-received");
      await reports.submit({ serverId, observed, epoch });
    },
    capacityChanged: options.capacityChanged,
  };
}
