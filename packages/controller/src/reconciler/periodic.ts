import { errorMessage } from "@palebluedot/shared/errors.ts";
import type { Logger } from "@palebluedot/shared/logger.ts";
import { schedule, validate, type ScheduledTask } from "node-cron";
import type { Sql } from "postgres";
import type { Leadership } from "./leadership.ts";

/** Work by the clock: housekeeping that may be skipped and may run twice. */
export interface PeriodicJob {
  readonly name: string;
  /** Cron expression in UTC; six fields begin with seconds. */
  readonly cron: string;
  /** Resolves with a few words or numbers for the log. */
  run(signal: AbortSignal): Promise<Readonly<Record<string, unknown>> | void>;
}

export interface PeriodicJobs {
  /** Runs a job now, whoever leads. Unknown name: throws. */
  runNow(name: string): Promise<void>;
  start(): void;
  stop(): Promise<void>;
}

/** Runs jobs on the replica that leads; a run that is still going on is not started again. */
export function createPeriodicJobs(options: {
  readonly jobs: readonly PeriodicJob[];
  readonly leadership: Pick<Leadership, "current">;
  readonly log: Logger;
}): PeriodicJobs {
  const { jobs, log } = options;
  const tasks: ScheduledTask[] = [];
  const running = new Map<string, Promise<void>>();
  const names = new Set(jobs.map((job) => job.name));
  if (names.size !== jobs.length) throw new Error("two periodic jobs have the same name");
  for (const job of jobs) {
    if (!validate(job.cron)) throw new Error(`periodic job ${job.name}: bad expression ${job.cron}`);
  }

  async function execute(job: PeriodicJob, signal: AbortSignal): Promise<void> {
    const startedAt = performance.now();
    try {
      const result = await job.run(signal);
      log.debug(
        { job: job.name, duration_ms: Math.round(performance.now() - startedAt), ...result },
        "periodic job",
      );
    } catch (error) {
      // The next run tries again.
      log.warn({ job: job.name, error: errorMessage(error) }, "periodic job failed");
    }
  }

  function launch(job: PeriodicJob, signal: AbortSignal): Promise<void> {
    const going = running.get(job.name);
    if (going !== undefined) return going;
    const run = execute(job, signal).finally(() => running.delete(job.name));
    running.set(job.name, run);
    return run;
  }

  return {
    async runNow(name) {
      const job = jobs.find((candidate) => candidate.name === name);
      if (job === undefined) throw new Error(`no periodic job is named ${name}`);
      await launch(job, AbortSignal.timeout(600_000));
    },
    start() {
      for (const job of jobs) {
        const onTime = (): void => {
          const term = options.leadership.current();
          if (term !== undefined) void launch(job, term.signal);
        };
        tasks.push(schedule(job.cron, onTime, { name: job.name, timezone: "UTC" }));
      }
    },
    async stop() {
      for (const task of tasks.splice(0)) await task.destroy();
      await Promise.allSettled(running.values());
    },
  };
}

/** How long a repeated request with the same key is recognised. */
export const idempotencyHours = 24;

/** How long the end of a container's output is kept after its allocation ended. */
const outputTailDays = 30;

/** The allocation feature's and the queue's own housekeeping. */
export function createHousekeepingJobs(sql: Sql): PeriodicJob[] {
  return [
    {
      name: "purge-idempotency-keys",
      cron: "17 * * * *",
      async run() {
        const result = await sql`
          delete from idempotency_keys where created_at < now() - ${idempotencyHours} * interval '1 hour'`;
        return { deleted: result.count };
      },
    },
    {
      // The queue row is written together with each state; this is the second line of defence.
      name: "repair-allocation-queue",
      cron: "*/5 * * * *",
      async run() {
        const result = await sql`
          insert into reconcile_queue (kind, key, due_at)
          select 'allocation', id, now() from allocations
          where state <> 'ended' and not exists (
            select from reconcile_queue where kind = 'allocation' and key = allocations.id)
          on conflict do nothing`;
        return { repaired: result.count };
      },
    },
    {
      name: "forget-output",
      cron: "47 * * * *",
      async run() {
        const result = await sql`
          update allocations set output_tail = null
          where output_tail is not null and ended_at < now() - ${outputTailDays} * interval '1 day'`;
        return { forgotten: result.count };
      },
    },
    {
      name: "wipe-ended-secrets",
      cron: "37 * * * *",
      async run() {
        const result = await sql`
          update allocations set secrets_encrypted = null where state = 'ended' and secrets_encrypted is not null`;
        return { wiped: result.count };
      },
    },
  ];
}
