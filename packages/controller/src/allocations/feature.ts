import { errorMessage } from "@palebluedot/shared/errors.ts";
import type { Dependencies } from "../dependencies.ts";
import { createLeadership, type Leadership } from "../reconciler/leadership.ts";
import { createReconciler, type Reconciler } from "../reconciler/reconciler.ts";
import type { PlacementPolicy } from "../scheduler/placement.ts";
import { createScheduler, type Scheduler } from "../scheduler/scheduler.ts";
import { createAgentPort } from "./agent-port.ts";
import { allocationMetrics } from "./metrics.ts";
import { createOverdueHandler } from "./overdue.ts";
import { createAllocationService } from "./service.ts";
import { createTransitionWriter, type Transitioned } from "./transitions.ts";
import type { AllocationAgentPort, AllocationService } from "./types.ts";

export interface AllocationFeatureOptions {
  /** Servers whose desired state changed: push it to those with a session here. Must not throw. */
  readonly desiredStateChanged: (serverIds: readonly string[]) => void;
  /** Absent: other replicas are told about every change. */
  readonly isConnectedHere?: (serverId: string) => boolean;
  /** Events were committed: the relay may look at once. Must not throw. */
  readonly eventsAppended?: () => void;
  readonly policy?: PlacementPolicy;
  /** How long a start may take while its agent pulls the image or makes the container; default 3600. */
  readonly provisioningSeconds?: number;
  /** For tests; default: a lease named "scheduler". */
  readonly leadership?: Leadership;
}

export interface AllocationFeature {
  readonly service: AllocationService;
  readonly agentPort: AllocationAgentPort;
  readonly scheduler: Scheduler;
  readonly reconciler: Reconciler;
  /** Who leads here may also run the periodic jobs. */
  readonly leadership: Leadership;
  start(): void;
  stop(): Promise<void>;
}

/** 150 ids of 36 characters stay below the limit of a notification. */
const notifiedIds = 150;

export function createAllocationFeature(
  deps: Omit<Dependencies, "config">,
  options: AllocationFeatureOptions,
): AllocationFeature {
  const { sql, clock, failpoints, notifications } = deps;
  const log = deps.log.child({ feature: "allocations" });
  const metrics = allocationMetrics(deps.metrics);
  const writer = createTransitionWriter({ log, metrics });
  const leadership =
    options.leadership ?? createLeadership({ sql, name: "scheduler", holder: deps.replicaId, log });

  /** After a commit: whoever has to act learns of it. All of these are hints; each has its own poll. */
  function onTransitioned(done: readonly Transitioned[]): void {
    if (done.length === 0) return;
    const desired = new Set<string>();
    const freed = new Set<string>();
    const cancelled: string[] = [];
    for (const change of done) {
      if (change.serverId === null) {
        cancelled.push(change.id);
        continue;
      }
      if (change.to === "scheduled" || change.to === "releasing" || change.to === "ended") {
        desired.add(change.serverId);
      }
      if (change.to === "ended") freed.add(change.serverId);
    }
    if (desired.size > 0) {
      options.desiredStateChanged([...desired]);
      tellOtherReplicas([...desired]);
    }
    if (freed.size > 0) scheduler.capacityChanged([...freed]);
    if (cancelled.length > 0) scheduler.withdraw(cancelled);
    options.eventsAppended?.();
  }

  function tellOtherReplicas(serverIds: readonly string[]): void {
    const elsewhere =
      options.isConnectedHere === undefined
        ? serverIds
        : serverIds.filter((id) => options.isConnectedHere?.(id) !== true);
    for (let start = 0; start < elsewhere.length; start += notifiedIds) {
      notifications
        .notify("desired_state", elsewhere.slice(start, start + notifiedIds).join(","))
        .catch((error: unknown) => log.debug({ error: errorMessage(error) }, "hint not sent"));
    }
  }

  const scheduler = createScheduler({
    sql,
    clock,
    log,
    failpoints,
    metrics,
    notifications,
    leadership,
    writer,
    onScheduled: onTransitioned,
    ...(options.policy === undefined ? {} : { policy: options.policy }),
  });

  const service = createAllocationService({
    sql,
    clock,
    log,
    secrets: deps.secrets,
    failpoints,
    writer,
    onTransitioned,
    onCreated: (submissions) => {
      scheduler.submit(submissions);
      options.eventsAppended?.();
    },
  });

  const agentPort = createAgentPort({
    sql,
    clock,
    log,
    secrets: deps.secrets,
    failpoints,
    metrics,
    writer,
    onTransitioned,
    capacityChanged: (serverIds) => scheduler.capacityChanged(serverIds),
  });

  const reconciler = createReconciler({
    sql,
    clock,
    log,
    metrics: deps.metrics,
    notifications,
    handlers: [
      createOverdueHandler({
        sql,
        clock,
        log,
        writer,
        onTransitioned,
        pokeScheduler: () => scheduler.poke(),
        provisioningMs: (options.provisioningSeconds ?? 3600) * 1000,
      }),
    ],
  });

  return {
    service,
    agentPort,
    scheduler,
    reconciler,
    leadership,
    start() {
      scheduler.start();
      leadership.start();
      reconciler.start();
    },
    async stop() {
      await reconciler.stop();
      await scheduler.stop();
      await leadership.stop();
    },
  };
}
