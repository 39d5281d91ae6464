import { setTimeout as sleep } from "node:timers/promises";
import { parseArgs } from "node:util";
import { createApi } from "../packages/simulator/src/cluster/api.ts";
import { eventually } from "../packages/simulator/src/cluster/eventually.ts";
import type { Bench } from "./main.ts";
import { cpuSeconds, progress, quantile, report, rssMib } from "./measure.ts";
import { startBenchPlatform, type BenchPlatform } from "./platform.ts";

const wanted = (gpus: number): object => ({
  gpus: { count: gpus },
  container: { image: "bench/idle" },
  lease_seconds: 3600,
});

/** Requests to claims to start commands, through REST, PostgreSQL with durable commits and the agent link. */
export const allocationBench: Bench = {
  summary: "--agents N [--rate R] [--seconds 30] [--clients 1,8,64]: latency, rate and fill",
  async run(args) {
    const { values } = parseArgs({
      args: [...args],
      options: {
        agents: { type: "string", default: "100" },
        rate: { type: "string", default: "50" },
        seconds: { type: "string", default: "30" },
        clients: { type: "string", default: "1,8,64" },
      },
    });
    const agents = Number(values.agents);
    const rate = Number(values.rate);
    const seconds = Number(values.seconds);
    const startCommands = new Map<string, number>();
    await using platform = await startBenchPlatform({
      agents,
      telemetryIntervalMs: 10_000,
      onStartCommand: (allocationId, t) => {
        if (!startCommands.has(allocationId)) startCommands.set(allocationId, t);
      },
    });
    const tenant = await platform.controller.api.post("/api/v1/tenants", { name: "bench" });
    const token = await platform.controller.api.post(`/api/v1/tenants/${tenant.id}/tokens`, {
      name: "bench",
    });
    const api = createApi(platform.controller.url, token.token);

    await openLoop(platform, api, { agents, rate, seconds }, startCommands);
    await drained(platform);
    for (const clients of values.clients.split(",").map(Number)) {
      await closedLoop(platform, api, { agents, clients, seconds }, startCommands);
      await drained(platform);
    }
    await fill(platform, api, agents);
  },
};

type Api = ReturnType<typeof createApi>;

function now(): number {
  return performance.timeOrigin + performance.now();
}

/** A fixed arrival rate, whatever the answers take: queueing shows as latency. Each is released a second later. */
async function openLoop(
  platform: BenchPlatform,
  api: Api,
  options: { readonly agents: number; readonly rate: number; readonly seconds: number },
  startCommands: ReadonlyMap<string, number>,
): Promise<void> {
  progress(`open loop: ${options.rate} allocations/s for ${options.seconds} s ...`);
  // A few first, so that connections and code are warm on both sides.
  await Promise.all(Array.from({ length: 20 }, () => once(api)));
  const sentAt = new Map<string, number>();
  const accepted: number[] = [];
  const pending: Promise<unknown>[] = [];
  const commits = watchCommits(platform);
  const cpuBefore = cpuSeconds(platform.controller.pid);
  const startedAt = performance.now();
  let failures = 0;
  for (let index = 0; index < options.rate * options.seconds; index += 1) {
    const due = startedAt + (index * 1000) / options.rate;
    const wait = due - performance.now();
    if (wait > 1) await sleep(wait);
    pending.push(
      (async () => {
        const sent = now();
        const allocation = await api.post("/api/v1/allocations", wanted(1));
        accepted.push(now() - sent);
        sentAt.set(allocation.id, sent);
        await sleep(1000);
        await api.delete(`/api/v1/allocations/${allocation.id}`);
      })().catch((error: unknown) => {
        failures += 1;
        progress(String(error));
      }),
    );
  }
  await Promise.all(pending);
  const elapsed = (performance.now() - startedAt) / 1000;
  await commits.stop();
  const { committed } = commits;
  await drained(platform);
  const toClaims = [...sentAt].flatMap(([id, sent]) =>
    committed.has(id) ? [(committed.get(id) ?? 0) - sent] : [],
  );
  const toStart = [...sentAt].flatMap(([id, sent]) => {
    const at = startCommands.get(id);
    return at === undefined ? [] : [at - sent];
  });
  const extra = { agents: options.agents, rate: options.rate, failures };
  for (const [name, latencies] of [
    ["post_to_accepted", accepted],
    ["post_to_claims_committed", toClaims],
    ["post_to_start_command", toStart],
  ] as const) {
    report("allocation", `${name}_p50`, quantile(latencies, 0.5), "ms", {
      ...extra,
      samples: latencies.length,
    });
    report("allocation", `${name}_p99`, quantile(latencies, 0.99), "ms", {
      ...extra,
      samples: latencies.length,
    });
  }
  report(
    "allocation",
    "controller_cpu",
    (100 * (cpuSeconds(platform.controller.pid) - cpuBefore)) / elapsed,
    "% of a core",
    extra,
  );
}

/** Each client allocates, waits for the start command, releases, and begins again. */
async function closedLoop(
  platform: BenchPlatform,
  api: Api,
  options: { readonly agents: number; readonly clients: number; readonly seconds: number },
  startCommands: ReadonlyMap<string, number>,
): Promise<void> {
  progress(`closed loop: ${options.clients} clients for ${options.seconds} s ...`);
  const latencies: number[] = [];
  const until = performance.now() + options.seconds * 1000;
  const client = async (): Promise<void> => {
    while (performance.now() < until) {
      const sent = now();
      const allocation = await api.post("/api/v1/allocations", wanted(1));
      await eventually("start command", () => startCommands.has(allocation.id), {
        intervalMs: 1,
        timeoutMs: 60_000,
      });
      latencies.push((startCommands.get(allocation.id) ?? 0) - sent);
      await api.delete(`/api/v1/allocations/${allocation.id}`);
    }
  };
  await Promise.all(Array.from({ length: options.clients }, client));
  const extra = { agents: options.agents, clients: options.clients };
  report("allocation", "closed_loop_rate", latencies.length / options.seconds, "allocations/s", extra);
  report("allocation", "closed_loop_p50", quantile(latencies, 0.5), "ms", extra);
  report("allocation", "closed_loop_p99", quantile(latencies, 0.99), "ms", extra);
}

/** Every GPU of the fleet, one allocation each, 16 requests in flight; until all claims are committed. */
async function fill(platform: BenchPlatform, api: Api, agents: number): Promise<void> {
  const gpus = agents * 8;
  progress(`fill: ${gpus} GPUs ...`);
  const startedAt = performance.now();
  let next = 0;
  await Promise.all(
    Array.from({ length: 16 }, async () => {
      while (next < gpus) {
        next += 1;
        await api.post("/api/v1/allocations", wanted(1));
      }
    }),
  );
  await eventually(
    "all GPUs are claimed",
    async () => {
      const [row] = await platform.sql<
        { count: number }[]
      >`select count(*)::int as count from claims where released_at is null`;
      return row?.count === gpus;
    },
    { timeoutMs: 600_000, intervalMs: 20 },
  );
  const claimed = (performance.now() - startedAt) / 1000;
  await eventually(
    "all allocations are active",
    async () => {
      const [row] = await platform.sql<
        { count: number }[]
      >`select count(*)::int as count from allocations where state = 'active'`;
      return row?.count === gpus;
    },
    { timeoutMs: 600_000, intervalMs: 20 },
  );
  const active = (performance.now() - startedAt) / 1000;
  const extra = { agents, gpus };
  report("allocation", "fill_claimed", claimed, "s", extra);
  report("allocation", "fill_active", active, "s", extra);
  report("allocation", "fill_rate", gpus / claimed, "allocations/s", extra);
  report("allocation", "controller_rss", rssMib(platform.controller.pid), "MiB", extra);
}

async function once(api: Api): Promise<void> {
  const allocation = await api.post("/api/v1/allocations", wanted(1));
  await api.delete(`/api/v1/allocations/${allocation.id}`);
}

/** Until nothing is claimed and nothing waits. */
async function drained(platform: BenchPlatform): Promise<void> {
  await eventually(
    "all allocations ended",
    async () => {
      const [row] = await platform.sql<
        { count: number }[]
      >`select count(*)::int as count from allocations where state <> 'ended'`;
      return row?.count === 0;
    },
    { timeoutMs: 120_000, intervalMs: 100 },
  );
}

/**
 * Notes when the commit record of each live claim was written, in ms since the epoch, as PostgreSQL keeps it
 * (`track_commit_timestamp`). The flush to disk comes after it; the start command, measured beside it, is
 * sent only after the flush. Sampled while the claim lives, since its release writes the row anew.
 */
function watchCommits(platform: BenchPlatform): {
  readonly committed: ReadonlyMap<string, number>;
  stop(): Promise<void>;
} {
  const committed = new Map<string, number>();
  let stopped = false;
  const loop = (async () => {
    while (!stopped) {
      const rows = await platform.sql<{ id: string; ms: number }[]>`
        select allocation_id as id, (extract(epoch from pg_xact_commit_timestamp(xmin)) * 1000)::float8 as ms
        from claims where released_at is null and usage_ended_at is null`;
      for (const row of rows) if (!committed.has(row.id)) committed.set(row.id, row.ms);
      await sleep(300);
    }
  })();
  return {
    committed,
    stop: async () => {
      stopped = true;
      await loop;
    },
  };
}
