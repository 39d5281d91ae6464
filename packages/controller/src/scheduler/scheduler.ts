import { fullJitterMs } from "@palebluedot/shared/backoff.ts";
import { gpuRequestSchema, type GpuRequest } from "@palebluedot/shared/allocation-request.ts";
import type { Clock } from "@palebluedot/shared/clock.ts";
import { errorMessage } from "@palebluedot/shared/errors.ts";
import type { Logger } from "@palebluedot/shared/logger.ts";
import type { Sql } from "postgres";
import type { AllocationMetrics } from "../allocations/metrics.ts";
import {
  retryDeadlocks,
  type Transition,
  type Transitioned,
  type TransitionWriter,
} from "../allocations/transitions.ts";
import { databaseErrorCode } from "../db/connect.ts";
import type { Notifications } from "../db/notifications.ts";
import type { Failpoints } from "../reconciler/failpoints.ts";
import type { Leadership, Term } from "../reconciler/leadership.ts";
import { readCapacity } from "./capacity.ts";
import {
  bestFit,
  createCapacityIndex,
  type CapacityIndex,
  type Placement,
  type PlacementPolicy,
  type PlacementRequest,
} from "./placement.ts";
import { createWaitingList, type WaitingRequest } from "./waiting.ts";

/** A new allocation, handed over by the one who wrote it. */
export interface Submission {
  readonly id: string;
  readonly priority: number;
  readonly createdAt: number;
  readonly gpus: GpuRequest;
  readonly message: string;
}

export interface SchedulerOptions {
  readonly sql: Sql;
  readonly clock: Clock;
  readonly log: Logger;
  readonly failpoints: Failpoints;
  readonly metrics: AllocationMetrics;
  readonly notifications: Notifications;
  readonly leadership: Pick<Leadership, "current" | "onTerm">;
  readonly writer: TransitionWriter;
  /** Called after a commit, before anybody else is told. */
  readonly onScheduled: (done: readonly Transitioned[]) => void;
  readonly policy?: PlacementPolicy;
  readonly random?: () => number;
  /** A request that waits longer gets a server kept free for it. Default 300,000. */
  readonly holdAfterMs?: number;
  /** How often the queue is compared with the database. Default 5,000. */
  readonly pollMs?: number;
}

export interface Scheduler {
  /** New allocations. Elsewhere than at the leader: tells the leader. Never throws. */
  submit(submissions: readonly Submission[]): void;
  /** They no longer wait. */
  withdraw(ids: readonly string[]): void;
  /** Free capacity of these servers must be read again. Never throws. */
  capacityChanged(serverIds: readonly string[]): void;
  poke(): void;
  /** One pass in the foreground, for tests: returns how many were placed. Leads without asking. */
  runOnce(): Promise<number>;
  start(): void;
  stop(): Promise<void>;
}

const maxBatch = 256;
const rereadChunk = 500;
const sweepChunk = 200;
/** How many of the waiting are told why; those behind them have the same reason or come later. */
const explainedWaiting = 100;
const explainEveryMs = 1000;
/** For how many of the waiting a server is kept free. */
const maxHolders = 8;
/** Ids in one notification: 36 characters each, payloads end at 8,000 bytes. */
const notifiedIds = 150;

interface Decision {
  readonly waiting: WaitingRequest;
  readonly placement: Placement;
}

const toRequest = (gpus: GpuRequest): PlacementRequest => ({
  count: gpus.count,
  model: gpus.model,
  minMemoryBytes: gpus.min_memory_bytes,
  ...(Object.keys(gpus.labels).length === 0 ? {} : { labels: gpus.labels }),
  serverId: gpus.server_id,
});

const shapeOf = (request: PlacementRequest): string =>
  JSON.stringify([request.count, request.model, request.minMemoryBytes, request.labels, request.serverId]);

const idsOf = (payload: string): string[] => payload.split(",").filter((id) => id.length === 36);

/**
 * Decides in memory and commits in batches. Only the leader decides; if two believe that they lead, the
 * exclusion constraints let one of them win each GPU and the other reads that server again.
 */
export function createScheduler(options: SchedulerOptions): Scheduler {
  const { sql, clock, log, metrics, writer } = options;
  const holdAfterMs = options.holdAfterMs ?? 300_000;
  const pollMs = options.pollMs ?? 5000;
  const random = options.random ?? Math.random;
  const index: CapacityIndex = createCapacityIndex(options.policy ?? bestFit);
  const waiting = createWaitingList();
  const dirtyServers = new Set<string>();
  const idsToRead = new Set<string>();
  /** Shapes that found nothing since capacity last grew. */
  const hopeless = new Set<string>();
  let loaded = false;
  let reloadWanted = false;
  let queueReadAt = -Infinity;
  let explainedAt = -Infinity;
  let sweptAt = performance.now();
  let sweepCursor: string | undefined;
  let unsettled = true;
  let wake: (() => void) | undefined;
  let loop: Promise<void> | undefined;
  let stopped = false;
  const unlisten: (() => void)[] = [];

  // ---- reading --------------------------------------------------------------------------------

  async function rereadServers(ids: readonly string[]): Promise<void> {
    for (let start = 0; start < ids.length; start += rereadChunk) {
      const chunk = ids.slice(start, start + rereadChunk);
      const found = await readCapacity(sql, chunk);
      const foundIds = new Set(found.map((server) => server.id));
      for (const server of found) index.set(server);
      for (const id of chunk) if (!foundIds.has(id)) index.remove(id);
    }
    if (ids.length > 0) {
      hopeless.clear();
      unsettled = true;
    }
  }

  async function load(): Promise<void> {
    const startedAt = performance.now();
    reloadWanted = false;
    index.clear();
    waiting.clear();
    dirtyServers.clear();
    const rows = await sql<{ id: string }[]>`select id from servers where state <> 'retired'`;
    await rereadServers(rows.map((row) => row.id));
    await readQueue();
    loaded = true;
    log.info(
      { servers: index.size, waiting: waiting.size, duration_ms: Math.round(performance.now() - startedAt) },
      "scheduler loaded the fleet",
    );
  }

  async function readWaiting(ids: readonly string[]): Promise<void> {
    for (let start = 0; start < ids.length; start += 1000) {
      const rows = await sql<
        { id: string; priority: number; created_at: Date; gpus: unknown; message: string }[]
      >`
        select id, priority, created_at, request -> 'gpus' as gpus, message
        from allocations where id = any(${ids.slice(start, start + 1000)}::uuid[]) and state = 'queued'`;
      for (const row of rows) {
        if (waiting.has(row.id)) continue;
        waiting.add({
          id: row.id,
          priority: row.priority,
          createdAt: row.created_at.getTime(),
          request: toRequest(gpuRequestSchema.parse(row.gpus)),
          message: row.message,
        });
        unsettled = true;
      }
    }
  }

  /** Makes the list in memory equal to the queue in the database: notifications may be lost. */
  async function readQueue(): Promise<void> {
    const mark = waiting.mark();
    const rows = await sql<{ id: string }[]>`select id from allocations where state = 'queued'`;
    const queued = new Set(rows.map((row) => row.id));
    // What was submitted after the query began is not in its answer.
    for (const id of waiting.addedBefore(mark)) {
      if (queued.has(id)) continue;
      waiting.remove(id);
      // A server may have been kept free for it.
      unsettled = true;
    }
    await readWaiting([...queued].filter((id) => !waiting.has(id)));
    queueReadAt = performance.now();
  }

  /** A slow round over the fleet finds what no notification told. */
  async function sweep(): Promise<void> {
    sweptAt = performance.now();
    const rows = await sql<{ id: string }[]>`
      select id from servers where id > ${sweepCursor ?? "00000000-0000-0000-0000-000000000000"}
      order by id limit ${sweepChunk}`;
    sweepCursor = rows.length < sweepChunk ? undefined : rows.at(-1)?.id;
    if (rows.length > 0) await rereadServers(rows.map((row) => row.id));
  }

  // ---- deciding -------------------------------------------------------------------------------

  function decide(): Decision[] {
    const decisions: Decision[] = [];
    const held = new Set<string>();
    // What finds nothing while servers are kept free may find something when they no longer are.
    const hopelessWhileHeld = new Set<string>();
    let holders = 0;
    const now = clock.now();
    for (const request of waiting.inOrder()) {
      if (decisions.length >= maxBatch) break;
      const overdue = now - request.createdAt > holdAfterMs && holders < maxHolders;
      const shape = shapeOf(request.request);
      if (!overdue && (hopeless.has(shape) || hopelessWhileHeld.has(shape))) continue;
      const startedAt = performance.now();
      const placement = index.place(request.request, held);
      metrics.decisionSeconds.observe((performance.now() - startedAt) / 1000);
      if (placement !== undefined) {
        index.commit(placement);
        decisions.push({ waiting: request, placement });
        continue;
      }
      (held.size === 0 ? hopeless : hopelessWhileHeld).add(shape);
      if (!overdue) continue;
      // Small requests behind it must not take every GPU that becomes free, for ever.
      const kept = index.mostPromising(request.request);
      if (kept === undefined) continue;
      held.add(kept);
      holders += 1;
    }
    if (decisions.length < maxBatch) unsettled = false;
    return decisions;
  }

  async function commit(decisions: readonly Decision[]): Promise<number> {
    const transitions = decisions.map(({ waiting: { id }, placement }): Transition => ({
      id,
      from: ["queued"],
      to: "scheduled",
      serverId: placement.serverId,
      gpuIds: placement.gpuIds,
      message: "",
    }));
    const startedAt = performance.now();
    let done: Transitioned[];
    try {
      done = await retryDeadlocks(() => writer.write(sql, transitions, clock.now()), log);
    } catch (error) {
      // 23P01: somebody else has one of these GPUs. 23503: a GPU or server went away.
      const code = databaseErrorCode(error);
      if (code !== "23P01" && code !== "23503") throw error;
      metrics.batches.inc({ outcome: "conflict" });
      return resolveConflict(decisions);
    }
    metrics.batchSeconds.observe((performance.now() - startedAt) / 1000);
    metrics.batches.inc({ outcome: "committed" });
    options.failpoints.hit("allocation-claimed");
    const doneIds = new Set(done.map((change) => change.id));
    for (const { waiting: request, placement } of decisions) {
      if (doneIds.has(request.id)) {
        waiting.remove(request.id);
        continue;
      }
      // Cancelled, or the server was closed meanwhile: read both again.
      dirtyServers.add(placement.serverId);
      waiting.remove(request.id);
      idsToRead.add(request.id);
    }
    writer.committed(done);
    options.onScheduled(done);
    return done.length;
  }

  /** Halves the batch until the conflicting placement is alone; the rest is committed. */
  async function resolveConflict(decisions: readonly Decision[]): Promise<number> {
    if (decisions.length > 1) {
      const middle = decisions.length >> 1;
      return (await commit(decisions.slice(0, middle))) + (await commit(decisions.slice(middle)));
    }
    for (const { placement } of decisions) dirtyServers.add(placement.serverId);
    unsettled = true;
    return 0;
  }

  function explain(request: PlacementRequest): string {
    if (index.place(request) === undefined) return index.explain(request);
    return "the GPUs that would fit are kept free for a request that has waited longer";
  }

  /** Tells the first of the waiting why they wait; writes only what changed. */
  async function explainWaiting(): Promise<void> {
    if (waiting.size === 0 || performance.now() - explainedAt < explainEveryMs) return;
    explainedAt = performance.now();
    const words = new Map<string, string>();
    const changes: { id: string; message: string }[] = [];
    for (const request of waiting.inOrder().slice(0, explainedWaiting)) {
      const shape = shapeOf(request.request);
      const message = words.get(shape) ?? explain(request.request);
      words.set(shape, message);
      if (request.message === message) continue;
      request.message = message;
      changes.push({ id: request.id, message });
    }
    if (changes.length === 0) return;
    await sql`
      update allocations set message = input.message
      from jsonb_to_recordset(${JSON.stringify(changes)}::text::jsonb) as input(id uuid, message text)
      where allocations.id = input.id and allocations.state = 'queued'`;
  }

  // ---- running --------------------------------------------------------------------------------

  /** One pass. Returns how many were placed. */
  async function pass(): Promise<number> {
    if (!loaded || reloadWanted) await load();
    if (dirtyServers.size > 0) {
      const ids = [...dirtyServers];
      dirtyServers.clear();
      await rereadServers(ids);
    }
    if (idsToRead.size > 0) {
      const ids = [...idsToRead];
      idsToRead.clear();
      await readWaiting(ids);
    }
    if (performance.now() - queueReadAt > pollMs) await readQueue();
    if (performance.now() - sweptAt > pollMs) await sweep();
    metrics.waiting.set(waiting.size);
    if (!unsettled) return 0;
    const decisions = decide();
    if (decisions.length === 0) return 0;
    options.failpoints.hit("allocation-decided");
    return commit(decisions);
  }

  /** Forgets what it knows: the outcome of a commit may be unknown, or another replica led. */
  function forget(): void {
    loaded = false;
    unsettled = true;
    hopeless.clear();
    idsToRead.clear();
  }

  async function lead(term: Term): Promise<void> {
    forget();
    let failures = 0;
    while (!term.signal.aborted && !stopped) {
      try {
        const placed = await pass();
        failures = 0;
        if (placed > 0 || unsettled || dirtyServers.size > 0 || idsToRead.size > 0) continue;
        await explainWaiting();
        await idle(waiting.size > 0 ? explainEveryMs : pollMs, term.signal);
      } catch (error) {
        failures += 1;
        forget();
        log.warn({ error: errorMessage(error) }, "the scheduler could not finish a pass");
        await idle(50 + fullJitterMs(failures, { baseMs: 100, capMs: 3000 }, random), term.signal);
      }
    }
    loaded = false;
  }

  async function idle(ms: number, signal: AbortSignal): Promise<void> {
    if (signal.aborted || stopped || dirtyServers.size > 0 || idsToRead.size > 0 || unsettled) {
      // Something came in during the last awaits; a failing pass still pauses.
      if (loaded || signal.aborted || stopped) return;
    }
    await new Promise<void>((settle) => {
      const done = (): void => {
        clearTimeout(timer);
        signal.removeEventListener("abort", done);
        settle();
      };
      const timer = setTimeout(done, ms);
      timer.unref();
      wake = done;
      signal.addEventListener("abort", done, { once: true });
    });
    wake = undefined;
  }

  const leads = (): boolean => options.leadership.current() !== undefined;

  function notifyInParts(channel: "queue" | "fleet", ids: readonly string[]): void {
    for (let start = 0; start < ids.length; start += notifiedIds) {
      options.notifications
        .notify(channel, ids.slice(start, start + notifiedIds).join(","))
        .catch((error: unknown) => log.debug({ channel, error: errorMessage(error) }, "hint not sent"));
    }
  }

  function markDirty(serverIds: readonly string[]): void {
    for (const id of serverIds) dirtyServers.add(id);
    wake?.();
  }

  return {
    submit(submissions) {
      if (!leads()) {
        notifyInParts(
          "queue",
          submissions.map((submission) => submission.id),
        );
        return;
      }
      for (const submission of submissions) {
        if (!loaded) {
          // The list is being read: it may have passed this one.
          idsToRead.add(submission.id);
          continue;
        }
        if (waiting.has(submission.id)) continue;
        waiting.add({
          id: submission.id,
          priority: submission.priority,
          createdAt: submission.createdAt,
          request: toRequest(submission.gpus),
          message: submission.message,
        });
      }
      unsettled = true;
      wake?.();
    },
    withdraw(ids) {
      // A server may have been kept free for one of them.
      for (const id of ids) waiting.remove(id);
      unsettled = true;
      wake?.();
    },
    capacityChanged(serverIds) {
      if (leads()) markDirty(serverIds);
      else notifyInParts("fleet", serverIds);
    },
    poke() {
      queueReadAt = -Infinity;
      wake?.();
    },
    async runOnce() {
      let placed = 0;
      queueReadAt = -Infinity;
      do placed += await pass();
      while (unsettled || dirtyServers.size > 0 || idsToRead.size > 0);
      explainedAt = -Infinity;
      await explainWaiting();
      return placed;
    },
    start() {
      unlisten.push(
        options.notifications.listen(
          "queue",
          (payload) => {
            for (const id of idsOf(payload)) idsToRead.add(id);
            wake?.();
          },
          () => {
            queueReadAt = -Infinity;
            wake?.();
          },
        ),
        options.notifications.listen(
          "fleet",
          (payload) => {
            if (payload === "*") reloadWanted = true;
            markDirty(idsOf(payload));
          },
          () => {
            reloadWanted = true;
            wake?.();
          },
        ),
        options.leadership.onTerm((term) => {
          const previous = loop ?? Promise.resolve();
          loop = previous.then(() => lead(term));
        }),
      );
    },
    async stop() {
      stopped = true;
      for (const end of unlisten.splice(0)) end();
      wake?.();
      await loop;
    },
  };
}
