import { chmodSync, mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import { createLogger } from "@palebluedot/shared/logger.ts";
import { connect } from "../packages/controller/src/db/connect.ts";
import { startEmbeddedPostgres } from "../packages/controller/src/db/embedded-postgres.ts";
import { startController, type ControllerProcess } from "../packages/simulator/src/cluster/controller.ts";
import { eventually } from "../packages/simulator/src/cluster/eventually.ts";
import { startFleet, type Fleet, type FleetOptions } from "../packages/simulator/src/fleet/fleet.ts";
import { progress } from "./measure.ts";

export interface BenchPlatform extends AsyncDisposable {
  readonly controller: ControllerProcess;
  readonly postgresPid: number;
  readonly sql: ReturnType<typeof connect>;
  readonly fleet: Fleet;
  /** From the first agent's enrolment to the last agent's session, seconds. */
  readonly joinSeconds: number;
}

/**
 * A real controller on its own durable PostgreSQL (with commit timestamps, to measure commits from outside)
 * and a fleet of simulated agents in this process, over mutual TLS.
 */
export async function startBenchPlatform(
  options: Pick<FleetOptions, "agents" | "telemetryIntervalMs"> & Partial<FleetOptions>,
): Promise<BenchPlatform> {
  const directory = mkdtempSync(join(tmpdir(), "palebluedot-bench-"));
  // The database runs as a user of its own, who must be able to pass.
  chmodSync(directory, 0o711);
  const log = createLogger({ name: "bench", level: "warn" });
  const database = await startEmbeddedPostgres({
    directory: join(directory, "postgres"),
    log,
    settings: { track_commit_timestamp: "on" },
  });
  const sql = connect(database.url, { applicationName: "bench", maxConnections: 2 });
  const controller = await startController({
    dataDir: join(directory, "controller"),
    databaseUrl: database.url,
    env: {
      PALEBLUEDOT_TELEMETRY_INTERVAL_MS: String(options.telemetryIntervalMs),
      PALEBLUEDOT_LOG_LEVEL: "warn",
      // One credential carries the whole load here.
      PALEBLUEDOT_RATE_LIMIT_PER_SECOND: "100000",
    },
  });
  const joinToken = await controller.api.post("/api/v1/join-tokens", {
    name: "bench",
    auto_approve: true,
    max_uses: 100_000,
  });
  progress(`${options.agents} agents enrol and connect ...`);
  const startedAt = performance.now();
  const fleet = await startFleet({
    gpusPerServer: 8,
    ...options,
    controller: controller.enrolmentEndpoint,
    caFingerprint: controller.caFingerprint,
    joinToken: joinToken.token,
  });
  await eventually(
    "all servers are available",
    async () => {
      const [row] = await sql<
        { count: number }[]
      >`select count(*)::int as count from servers where state = 'available'`;
      return (row?.count ?? 0) >= options.agents;
    },
    { timeoutMs: 600_000, intervalMs: 200 },
  );
  const joinSeconds = (performance.now() - startedAt) / 1000;
  await sleep(1000);
  return {
    controller,
    postgresPid: database.pid,
    sql,
    fleet,
    joinSeconds,
    async [Symbol.asyncDispose]() {
      await fleet.stop();
      await controller.stop();
      await sql.end({ timeout: 2 });
      await database.stop();
      rmSync(directory, { recursive: true, force: true });
    },
  };
}
