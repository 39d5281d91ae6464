import { Counter, Gauge, Histogram, type Registry } from "prom-client";

export interface AllocationMetrics {
  readonly transitions: Counter<"from" | "to" | "end_reason">;
  readonly stateSeconds: Histogram<"state">;
  readonly droppedReports: Counter<"reason">;
  readonly waiting: Gauge;
  readonly overdue: Gauge<"state">;
  readonly batches: Counter<"outcome">;
  readonly batchSeconds: Histogram;
  readonly decisionSeconds: Histogram;
}

const metricsOf = new WeakMap<Registry, AllocationMetrics>();

/** One set for each registry, however often the feature is built on it. */
export function allocationMetrics(registry: Registry): AllocationMetrics {
  const existing = metricsOf.get(registry);
  if (existing !== undefined) return existing;
  const registers = [registry];
  const metrics: AllocationMetrics = {
    transitions: new Counter({
      name: "palebluedot_allocation_transitions_total",
      help: "Allocations that changed state",
      labelNames: ["from", "to", "end_reason"],
      registers,
    }),
    stateSeconds: new Histogram({
      name: "palebluedot_allocation_state_seconds",
      help: "Time allocations spent in a state when they left it",
      labelNames: ["state"],
      buckets: [0.01, 0.05, 0.25, 1, 5, 15, 60, 300, 1800, 7200, 86_400],
      registers,
    }),
    droppedReports: new Counter({
      name: "palebluedot_allocation_reports_dropped_total",
      help: "Workload reports of agents that were not believed",
      labelNames: ["reason"],
      registers,
    }),
    waiting: new Gauge({
      name: "palebluedot_scheduler_waiting_allocations",
      help: "Queued allocations that the leading scheduler knows",
      registers,
    }),
    overdue: new Gauge({
      name: "palebluedot_allocations_overdue",
      help: "Allocations that have been in their state for longer than it may take, as the leading replica last counted",
      labelNames: ["state"],
      registers,
    }),
    batches: new Counter({
      name: "palebluedot_scheduler_commits_total",
      help: "Batches of placements by outcome",
      labelNames: ["outcome"],
      registers,
    }),
    batchSeconds: new Histogram({
      name: "palebluedot_scheduler_commit_seconds",
      help: "Time to commit one batch of placements",
      buckets: [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 2],
      registers,
    }),
    decisionSeconds: new Histogram({
      name: "palebluedot_scheduler_decision_seconds",
      help: "Time to decide one placement in memory",
      buckets: [0.00001, 0.0001, 0.0005, 0.001, 0.005, 0.02],
      registers,
    }),
  };
  metricsOf.set(registry, metrics);
  return metrics;
}
