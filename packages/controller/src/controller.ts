import { join } from "node:path";
import { systemClock } from "@palebluedot/shared/clock.ts";
import { errorMessage } from "@palebluedot/shared/errors.ts";
import type { Logger } from "@palebluedot/shared/logger.ts";
import { createSecretBox } from "@palebluedot/shared/secret-box.ts";
import { collectDefaultMetrics, Registry } from "prom-client";
import { createAllocationFeature } from "./allocations/feature.ts";
import { allocationMetrics } from "./allocations/metrics.ts";
import { countOverdueJob } from "./allocations/overdue-count.ts";
import type { ControllerConfig } from "./config/config.ts";
import { loadReplicaId, loadSecretKey, prepareDataDirectory, writeWhole } from "./config/data-directory.ts";
import { migrate } from "./db/migrate.ts";
import { createNotifications } from "./db/notifications.ts";
import { openDatabase } from "./db/open.ts";
import type { Dependencies } from "./dependencies.ts";
import { createEventFeature } from "./events/feature.ts";
import { createHttpApp } from "./http/app.ts";
import type { ReadinessCheck } from "./http/context.ts";
import { allRoutes } from "./http/routes.ts";
import { startHttpServer } from "./http/server.ts";
import { createIdentityService } from "./identity/identity.ts";
import { adminTokenPath, writeAdminToken } from "./identity/token-file.ts";
import { createFailpoints } from "./reconciler/failpoints.ts";
import { createLeadership } from "./reconciler/leadership.ts";
import { createHousekeepingJobs, createPeriodicJobs, type PeriodicJob } from "./reconciler/periodic.ts";
import { createServerStates } from "./servers/state-machine.ts";
import { type AgentListeners, startAgentListeners } from "./sessions/listeners.ts";

/** Where a running controller is reached; also written to `<data dir>/controller.json`. */
export interface ControllerAddresses {
  readonly pid: number;
  readonly version: string;
  readonly url: string;
  readonly http_port: number;
  readonly enrolment_port: number;
  readonly agent_port: number;
  /** sha256 of the CA certificate, lower-case hex: what agents pin. */
  readonly ca_fingerprint: string;
  readonly admin_token_file: string;
}

export interface RunningController {
  readonly addresses: ControllerAddresses;
  /** Ends everything in order. Never throws: what fails to stop is logged. */
  stop(): Promise<void>;
}

type Stopper = readonly [name: string, stop: () => Promise<void> | void];

const databaseCheckMs = 3000;

/** Starts all of it. When a part fails to start, the parts before it are stopped and the error is thrown. */
export async function startController(
  config: ControllerConfig,
  log: Logger,
  version: string,
): Promise<RunningController> {
  const stoppers: Stopper[] = [];
  const stop = async (): Promise<void> => {
    // Last started, first stopped: nothing runs longer than what it needs.
    for (const [name, stopPart] of stoppers.splice(0).reverse()) {
      try {
        await stopPart();
      } catch (error) {
        log.error({ part: name, error: errorMessage(error) }, "a part did not stop");
      }
    }
  };
  try {
    const addresses = await startParts(config, log, version, stoppers);
    return { addresses, stop };
  } catch (error) {
    await stop();
    throw error;
  }
}

async function startParts(
  config: ControllerConfig,
  log: Logger,
  version: string,
  stoppers: Stopper[],
): Promise<ControllerAddresses> {
  const dataDir = config.PALEBLUEDOT_DATA_DIR;
  const failpoints = createFailpoints(config.PALEBLUEDOT_FAILPOINT);
  await prepareDataDirectory(dataDir);
  const secrets = createSecretBox(await loadSecretKey(dataDir, config.PALEBLUEDOT_SECRET_KEY_FILE));
  const replicaId = await loadReplicaId(dataDir);

  const database = await openDatabase(config, log);
  stoppers.push(["database", () => database.close()]);
  const { sql } = database;
  const { incarnation } = await migrate(sql, { log });

  const metrics = new Registry();
  collectDefaultMetrics({ register: metrics });
  const notifications = createNotifications(sql, { log });
  stoppers.push(["notifications", () => notifications.close()]);
  const deps: Dependencies = {
    config,
    sql,
    clock: systemClock,
    log,
    failpoints,
    secrets,
    notifications,
    metrics,
    replicaId,
  };

  const identity = createIdentityService(deps);
  stoppers.push(["identity", () => identity.stop()]);
  const bootstrap = await identity.bootstrap(async (token) => {
    await writeAdminToken(dataDir, token);
  });
  if (bootstrap.made) log.info({ file: adminTokenPath(dataDir) }, "made the first admin token");

  const leadership = createLeadership({ sql, name: "controller", holder: replicaId, log });
  leadership.start();
  stoppers.push(["leadership", () => leadership.stop()]);

  const events = createEventFeature(deps, { isLeader: () => leadership.current() !== undefined });
  events.start();
  stoppers.push(["events", () => events.stop()]);

  // Allocations and sessions need each other: the first calls back into what is made after it.
  let listeners: AgentListeners | undefined;
  const allocations = createAllocationFeature(deps, {
    desiredStateChanged: (serverIds) => listeners?.registry.desiredStateChanged(serverIds),
    isConnectedHere: (serverId) => listeners?.registry.isConnected(serverId) === true,
    eventsAppended: () => events.poke(),
    provisioningSeconds: config.PALEBLUEDOT_PROVISIONING_SECONDS,
  });
  const agents = await startAgentListeners(deps, { allocations: allocations.agentPort });
  listeners = agents;
  stoppers.push(["agent listeners", () => agents.stop()]);
  allocations.start();
  stoppers.push(["allocations", () => allocations.stop()]);

  const periodic = createPeriodicJobs({
    jobs: [
      ...createHousekeepingJobs(sql),
      eventRetentionJob(config, events),
      countOverdueJob(
        sql,
        allocationMetrics(metrics),
        () => systemClock.now(),
        config.PALEBLUEDOT_PROVISIONING_SECONDS * 1000,
      ),
    ],
    leadership,
    log,
  });
  periodic.start();
  stoppers.push(["periodic jobs", () => periodic.stop()]);

  const stopping = new AbortController();
  const routes = allRoutes({
    deps,
    identity,
    enrolment: agents.enrolment,
    sessions: agents.registry,
    telemetry: agents.telemetry,
    events,
    allocations: allocations.service,
    serverStates: createServerStates(deps),
    version,
    fleetChanged(serverIds) {
      allocations.agentPort.capacityChanged(serverIds);
      agents.registry.desiredStateChanged(serverIds);
      for (const channel of ["fleet", "desired_state"] as const) {
        notifications.notify(channel, serverIds.join(",")).catch((error: unknown) => {
          log.warn({ channel, error: errorMessage(error) }, "other replicas were not told of a change");
        });
      }
    },
    readiness: async () => [
      await databaseCheck(sql),
      {
        name: "stopping",
        ready: !stopping.signal.aborted,
        message: stopping.signal.aborted ? "the controller stops" : "",
      },
    ],
  });
  const app = createHttpApp({
    routes,
    identity,
    log,
    metrics,
    stopping: stopping.signal,
  });
  const http = await startHttpServer(app, config);
  stoppers.push([
    "http",
    async () => {
      stopping.abort(new Error("the controller stops"));
      await http.stop(config.PALEBLUEDOT_SHUTDOWN_SECONDS * 1000);
    },
  ]);

  const addresses: ControllerAddresses = {
    pid: process.pid,
    version,
    url: `${http.tls ? "https" : "http"}://${urlHost(config.SERVER_HOST)}:${http.port}`,
    http_port: http.port,
    enrolment_port: agents.enrolmentPort,
    agent_port: agents.agentPort,
    ca_fingerprint: agents.caFingerprint,
    admin_token_file: adminTokenPath(dataDir),
  };
  await writeWhole(join(dataDir, "controller.json"), `${JSON.stringify(addresses, null, 2)}\n`, 0o644);
  // The logger names the process already.
  const { pid: _pid, ...reachedAt } = addresses;
  log.info({ ...reachedAt, incarnation, replica_id: replicaId }, "ready");
  return addresses;
}

/** The address that a client on this host can use: "any" is no destination. */
function urlHost(host: string): string {
  if (host === "0.0.0.0") return "127.0.0.1";
  if (host === "::") return "[::1]";
  return host.includes(":") ? `[${host}]` : host;
}

function eventRetentionJob(
  config: ControllerConfig,
  events: { purge(olderThan: Date): Promise<number> },
): PeriodicJob {
  return {
    name: "purge-events",
    cron: "7 * * * *",
    run: async () => ({
      deleted: await events.purge(
        new Date(Date.now() - config.PALEBLUEDOT_EVENT_RETENTION_DAYS * 86_400_000),
      ),
    }),
  };
}

async function databaseCheck(sql: Dependencies["sql"]): Promise<ReadinessCheck> {
  let timer: NodeJS.Timeout | undefined;
  try {
    const late = new Promise<never>((_resolve, reject) => {
      timer = setTimeout(() => reject(new Error("no answer in time")), databaseCheckMs);
    });
    await Promise.race([sql`select 1 from installation`, late]);
    return { name: "database", ready: true, message: "" };
  } catch {
    // The cause may name hosts and users; it is in the log of whoever asked the database.
    return { name: "database", ready: false, message: "the database does not answer" };
  } finally {
    clearTimeout(timer);
  }
}
