import { readFile } from "node:fs/promises";
import { hostname } from "node:os";
import { join } from "node:path";
import { mkdir } from "node:fs/promises";
import { systemClock } from "@palebluedot/shared/clock.ts";
import { errorMessage } from "@palebluedot/shared/errors.ts";
import type {
  DesiredState,
  GpuSample,
  HostInventory,
  Inventory,
} from "@palebluedot/shared/generated/palebluedot/agent/v1/agent.ts";
import type { Logger } from "@palebluedot/shared/logger.ts";
import type { AgentConfig } from "./config/config.ts";
import { createEnrolment } from "./enrolment/enrolment.ts";
import { createGpuMonitor } from "./gpu/monitor.ts";
import { collectHost, createHostSampler } from "./inventory/host.ts";
import { readIdentity } from "./inventory/identity.ts";
import { createEventJournal } from "./journal/event-journal.ts";
import { createEventRecorder } from "./journal/event-recorder.ts";
import type { JournalEntry } from "./journal/types.ts";
import { createMetrics } from "./metrics/metrics.ts";
import { startMetricsServer, type MetricsServer } from "./metrics/server.ts";
import { createReconciler } from "./reconcile/reconciler.ts";
import { createSession } from "./session/session.ts";
import { Upstream } from "./session/upstream.ts";
import { agentVersion } from "./version.ts";

/** What changes without anybody telling (conditions, the engine) is compared this often. */
const inventoryCheckMs = 5000;
const hostInventoryMs = 6 * 3_600_000;
/** A healthy nvidia-smi answers sooner, so that a restart does not make every GPU look unknown for a moment. */
const firstLookMs = 10_000;

/**
 * The agent: GPUs are watched and containers kept as desired from the first moment, with or without a
 * controller; the session is one more part that comes and goes. Resolves when the signal aborts; containers
 * keep running.
 */
export async function runAgent(config: AgentConfig, log: Logger, signal: AbortSignal): Promise<void> {
  const clock = systemClock;
  const dataDir = config.PALEBLUEDOT_DATA_DIR;
  await mkdir(dataDir, { recursive: true, mode: 0o700 });
  const journal = await createEventJournal({ dir: join(dataDir, "events"), log });
  const monitor = createGpuMonitor({
    nvidiaSmiPath: config.PALEBLUEDOT_NVIDIA_SMI,
    intervalMs: config.PALEBLUEDOT_TELEMETRY_INTERVAL_MS,
    kernelLogPath: config.PALEBLUEDOT_KERNEL_LOG === "none" ? undefined : config.PALEBLUEDOT_KERNEL_LOG,
    stateDir: join(dataDir, "gpu"),
    sysfsRoot: config.PALEBLUEDOT_SYSFS_ROOT,
    clock,
    log,
  });
  const reconciler = createReconciler({
    dataDir: join(dataDir, "workloads"),
    engineOptions: {
      ...(config.DOCKER_HOST === undefined ? {} : { dockerHost: config.DOCKER_HOST }),
      ...(config.DOCKER_CERT_PATH === undefined ? {} : { certPath: config.DOCKER_CERT_PATH }),
      ...(config.PALEBLUEDOT_GPU_MODE === undefined ? {} : { gpuMode: config.PALEBLUEDOT_GPU_MODE }),
      ...(config.PALEBLUEDOT_DEVICE_DIR === undefined ? {} : { deviceDir: config.PALEBLUEDOT_DEVICE_DIR }),
      ...(config.PALEBLUEDOT_CONTAINER_NETWORK === undefined
        ? {}
        : { network: config.PALEBLUEDOT_CONTAINER_NETWORK }),
      ...(config.PALEBLUEDOT_PUBLISH_ADDRESS === undefined
        ? {}
        : { publishAddress: config.PALEBLUEDOT_PUBLISH_ADDRESS }),
      allowedRegistries: config.PALEBLUEDOT_REGISTRY_ALLOW,
    },
    gpuMonitor: monitor,
    clock,
    log,
  });

  const recorder = createEventRecorder({ journal, clock, log });
  const record = (entry: JournalEntry): void => recorder.record(entry);
  const upstream = new Upstream(journal, {
    onUnsendable: (what, error) =>
      log.error({ what, err: errorMessage(error) }, "a message could not be encoded and was dropped"),
  });
  const identityOptions = {
    identityFile: config.PALEBLUEDOT_IDENTITY_FILE,
    sysfsRoot: config.PALEBLUEDOT_SYSFS_ROOT,
  };
  const enrolment = await createEnrolment({
    controller: config.PALEBLUEDOT_CONTROLLER,
    caFingerprint: config.PALEBLUEDOT_CA_FINGERPRINT,
    joinTokenFile: config.PALEBLUEDOT_JOIN_TOKEN_FILE,
    dir: join(dataDir, "identity"),
    agentVersion,
    identity: () => readIdentity(identityOptions),
    clock,
    log,
    exitOnRefusal: config.PALEBLUEDOT_EXIT_ON_REFUSAL,
  });

  let desired: DesiredState | undefined;
  let host: HostInventory | undefined;
  let metricsServer: MetricsServer | undefined;
  let intervalMs = config.PALEBLUEDOT_TELEMETRY_INTERVAL_MS;
  let lastTelemetryMs = 0;
  let firstLook: "waiting" | "late" | "done" = "waiting";

  function publishInventory(): void {
    if (host === undefined || firstLook === "waiting") return;
    const snapshot = monitor.snapshot();
    // Nobody has looked yet: "no GPUs" would read as if they were gone.
    if (firstLook === "late" && snapshot.gpus.length === 0) return;
    const inventory: Inventory = {
      host: {
        ...host,
        containerEngine: reconciler.engine(),
        driverVersion: snapshot.gpus[0]?.driverVersion ?? "",
        cudaVersion: snapshot.gpus[0]?.cudaVersion ?? "",
      },
      gpus: [...snapshot.gpus],
      conditions: [...snapshot.conditions, ...reconciler.conditions()],
    };
    upstream.inventory(inventory);
  }

  async function refreshHost(): Promise<void> {
    host = await collectHost({
      ...identityOptions,
      log,
      metricsPort: metricsServer?.port,
      metricsTls: config.PALEBLUEDOT_METRICS_TLS_CERT_FILE !== undefined,
    });
    publishInventory();
  }

  const session = createSession({
    enrolment,
    reconciler,
    journal,
    upstream,
    agentVersion,
    bootId: (await readFile("/proc/sys/kernel/random/boot_id", "utf8").catch(() => "")).trim(),
    clock,
    log,
    onWelcome: (welcome) => {
      // The controller may want fewer samples than are taken, never more.
      intervalMs = Math.max(config.PALEBLUEDOT_TELEMETRY_INTERVAL_MS, welcome.telemetryIntervalMs);
    },
    onDesired: (document) => {
      desired = document;
    },
    refreshInventory: async () => {
      await monitor.refresh();
      await refreshHost();
    },
  });

  const sampleHost = createHostSampler({ clock });
  async function sendTelemetry(samples: readonly GpuSample[]): Promise<void> {
    // A tenth of tolerance: the samples' own clock is not exact.
    if (clock.now() - lastTelemetryMs < intervalMs * 0.9) return;
    lastTelemetryMs = clock.now();
    upstream.telemetry(samples, [await sampleHost()]);
  }
  const guard = (work: Promise<unknown>, what: string): void => {
    work.catch((error: unknown) => {
      if (!signal.aborted) log.error({ err: errorMessage(error) }, what);
    });
  };

  const unsubscribe = [
    monitor.onSamples((samples) => guard(sendTelemetry(samples), "telemetry was not sent")),
    monitor.onSnapshot(publishInventory),
    monitor.onEvent(record),
    reconciler.onEvent(record),
    reconciler.onObserved((observed) => {
      upstream.observed(observed);
      publishInventory();
    }),
  ];

  const allocationOf = (gpuUuid: string): { allocationId: string; tenantId: string } | undefined =>
    desired?.workloads.find((workload) => workload.gpuUuids.includes(gpuUuid));
  const metrics = createMetrics({
    monitor,
    clock,
    hostname: hostname(),
    agentVersion,
    allocationOf,
    conditions: () => reconciler.conditions(),
    connected: () => session.connected(),
  });
  if (config.PALEBLUEDOT_METRICS_PORT !== undefined) {
    const certificateFile = config.PALEBLUEDOT_METRICS_TLS_CERT_FILE;
    const keyFile = config.PALEBLUEDOT_METRICS_TLS_KEY_FILE;
    metricsServer = await startMetricsServer({
      host: config.PALEBLUEDOT_METRICS_HOST,
      port: config.PALEBLUEDOT_METRICS_PORT,
      metrics,
      health: () => ({ ok: true, details: { connected: session.connected(), version: agentVersion } }),
      log,
      tls: certificateFile === undefined || keyFile === undefined ? undefined : { certificateFile, keyFile },
      tokenFile: config.PALEBLUEDOT_METRICS_TOKEN_FILE,
    });
    log.info({ port: metricsServer.port }, "metrics are served");
  }

  record({ type: "agent.started", timeUnixMs: clock.now(), message: `agent ${agentVersion} started` });
  // Before anything that needs the network: tenants' containers come first. Nothing waits for nvidia-smi:
  // until it answers the GPUs are those known from before.
  const watch = async (): Promise<void> => {
    await monitor.start();
    firstLook = "done";
    publishInventory();
  };
  const watching = watch();
  // Its failure ends the agent below, whatever happens until then.
  watching.catch(() => undefined);
  const firstLookTimer = setTimeout(() => {
    if (firstLook !== "waiting") return;
    log.warn("nvidia-smi has not answered yet; containers are kept as they are known");
    firstLook = "late";
    publishInventory();
  }, firstLookMs);
  await reconciler.start();
  const checks = setInterval(publishInventory, inventoryCheckMs);
  const hostChecks = setInterval(
    () => guard(refreshHost(), "the host could not be looked at"),
    hostInventoryMs,
  );
  try {
    await Promise.all([
      watching,
      refreshHost(),
      session.run(signal),
      enrolment
        .keepFresh(() => session.reconnect(), signal)
        .catch((error: unknown) => {
          if (!signal.aborted) throw error;
        }),
    ]);
  } finally {
    clearTimeout(firstLookTimer);
    clearInterval(checks);
    clearInterval(hostChecks);
    for (const end of unsubscribe) end();
    await metricsServer?.stop();
    await reconciler.stop();
    await monitor.stop();
    await recorder.stop();
    await journal.close();
  }
}
