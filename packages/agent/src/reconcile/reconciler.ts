import { randomBytes } from "node:crypto";
import { chmod, mkdir, readdir, readFile } from "node:fs/promises";
import { join } from "node:path";
import { PlatformError } from "@palebluedot/shared/errors.ts";
import {
  LogChunk_Stream,
  WorkloadDesired_Target,
  WorkloadObserved_Phase as Phase,
  ObservedState,
  type Condition,
  type DesiredState,
  type LogChunk,
  type WorkloadDesired,
  type WorkloadObserved,
} from "@palebluedot/shared/generated/palebluedot/agent/v1/agent.ts";
import { labelNames, readLabels } from "../containers/create-request.ts";
import { createContainerEngineClient, type ContainerEngineClient } from "../containers/engine.ts";
import { createVolumeStore } from "../containers/volumes.ts";
import { writeFileAtomic } from "./atomic-file.ts";
import type { WorkloadContext } from "./context.ts";
import { createDesiredStore, type DesiredStore } from "./desired-store.ts";
import { createDiskReserve, type DiskReserve } from "./disk-reserve.ts";
import { createEngineWatch, type EngineWatch } from "./engine-watch.ts";
import { createGpuGate } from "./gpu-gate.ts";
import { createImageAccess } from "./image-access.ts";
import type { ReconcilerOptions, ReconcilerTimings } from "./options.ts";
import { createRecordStore } from "./records.ts";
import type { Reconciler, WorkloadEvent } from "./types.ts";
import { createWorkload, type Workload } from "./workload.ts";

const defaultTimings: Required<ReconcilerTimings> = {
  engineCallMs: 15_000,
  enginePingMs: 10_000,
  resyncMs: 30_000,
  pullStallMs: 5 * 60_000,
  pullTotalMs: 60 * 60_000,
  retryBaseMs: 1000,
  verifyMs: 30_000,
  verifyPollMs: 1000,
};

/** More would be a fault of the controller: no host runs that many tenants. */
const maxWorkloads = 1024;
/** A message may have 4 MiB. */
const maxTailBytes = 1024 * 1024;
const defaultSocket = "unix:///var/run/docker.sock";

async function loadOwnerId(dataDir: string): Promise<string> {
  const path = join(dataDir, "owner-id");
  try {
    return (await readFile(path, "utf8")).trim();
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== "ENOENT") throw error;
  }
  const ownerId = randomBytes(8).toString("hex");
  await writeFileAtomic(path, `${ownerId}\n`);
  return ownerId;
}

function validated(document: DesiredState): DesiredState {
  if (document.workloads.length > maxWorkloads) {
    throw new PlatformError({
      code: "desired-state-invalid",
      kind: "invalid",
      message: `the desired state names ${document.workloads.length} workloads, at most ${maxWorkloads} are taken`,
    });
  }
  const unique = new Map(document.workloads.map((workload) => [workload.allocationId, workload]));
  if (unique.size === document.workloads.length && !unique.has("")) return document;
  throw new PlatformError({
    code: "desired-state-invalid",
    kind: "invalid",
    message: "the desired state names an allocation twice, or none",
  });
}

/** Everything that needs the data directory; made by `start`. */
interface Started {
  readonly store: DesiredStore;
  readonly context: WorkloadContext;
  readonly watch: EngineWatch;
  readonly disk: DiskReserve;
}

/**
 * Nothing is touched before `start`. Throws PlatformError `docker-host-invalid` or
 * `container-network-refused` at once when the options cannot work.
 */
export function createReconciler(options: ReconcilerOptions): Reconciler {
  const { clock, log, dataDir } = options;
  const random = options.random ?? Math.random;
  const timings = { ...defaultTimings, ...options.timings };
  const network = options.engineOptions.network ?? "bridge";
  if (network === "host" || network.startsWith("container:")) {
    throw new PlatformError({
      code: "container-network-refused",
      kind: "invalid",
      message: `containers of tenants cannot use the network ${JSON.stringify(network)}`,
      hint: "PALEBLUEDOT_CONTAINER_NETWORK: bridge, none, or the name of a network of the engine",
    });
  }
  const client: ContainerEngineClient = createContainerEngineClient({
    dockerHost: options.engineOptions.dockerHost ?? defaultSocket,
    certPath: options.engineOptions.certPath,
    callMs: timings.engineCallMs,
  });

  const workloads = new Map<string, Workload>();
  /** Workloads that are no longer in the document and not clean yet. */
  const orphans = new Set<string>();
  const observedListeners = new Set<(observed: ObservedState) => void>();
  const eventListeners = new Set<(event: WorkloadEvent) => void>();
  let desired: DesiredState | undefined;
  /** Of the document on disk; another one than `desired` while the disk takes nothing. */
  let onDisk = { incarnation: "", generation: 0 };
  let stored = true;
  /** As which server this host was told so. */
  let desiredFor: string | undefined;
  let started: Started | undefined;
  let stopped = false;
  let telling: NodeJS.Timeout | undefined;
  let lastTold: Buffer | undefined;
  /** Documents are taken one after the other. */
  let accepting: Promise<void> = Promise.resolve();

  function observed(): ObservedState {
    let tailBytes = 0;
    /** Ends of output are told as far as the message stays small; the picture itself always is. */
    const bounded = (workload: WorkloadObserved): WorkloadObserved => {
      tailBytes += workload.outputTail?.length ?? 0;
      return tailBytes <= maxTailBytes ? workload : { ...workload, outputTail: undefined };
    };
    return {
      incarnation: desired?.incarnation ?? "",
      generation: desired?.generation ?? 0,
      workloads: (desired?.workloads ?? []).flatMap((workload) => {
        const picture = workloads.get(workload.allocationId)?.observed();
        return picture === undefined ? [] : bounded(picture);
      }),
      conditions: conditions(),
    };
  }

  function conditions(): Condition[] {
    if (!started) return [];
    const disk = started.disk.condition();
    return disk === undefined ? [started.watch.condition()] : [started.watch.condition(), disk];
  }

  /** Coalesced: many changes of one turn of the loop are told once. */
  function changed(): void {
    telling ??= setTimeout(() => {
      telling = undefined;
      if (stopped) return;
      const picture = observed();
      const encoded = Buffer.from(ObservedState.encode(picture).finish());
      if (lastTold?.equals(encoded) === true) return;
      lastTold = encoded;
      for (const listener of observedListeners) listener(picture);
    }, 10);
  }

  function emit(type: string, allocationId: string, message: string, data: WorkloadEvent["data"] = {}): void {
    const event = { type, allocationId, message, timeUnixMs: clock.now(), data };
    for (const listener of eventListeners) listener(event);
  }

  function parts(): Started {
    if (started) return started;
    throw new PlatformError({
      code: "reconciler-not-started",
      kind: "internal",
      message: "the reconciler was not started",
    });
  }

  function put(workload: WorkloadDesired): void {
    const { context, watch } = parts();
    const { allocationId } = workload;
    const present = workloads.get(allocationId);
    if (present) {
      present.revise(workload);
      return;
    }
    workloads.set(
      allocationId,
      createWorkload({
        desired: workload,
        context,
        onChanged: changed,
        onClean: () => forget(allocationId),
        onDoubt: () => watch.doubt(),
      }),
    );
  }

  /** A clean workload stays known while the document names it. */
  function forget(allocationId: string): void {
    if (!orphans.delete(allocationId)) return;
    const workload = workloads.get(allocationId);
    workloads.delete(allocationId);
    parts().context.records.delete(allocationId);
    void workload?.stop();
    emit("container.orphan-removed", allocationId, "what was left of a workload nobody wants is gone");
  }

  function orphan(workload: WorkloadDesired): void {
    orphans.add(workload.allocationId);
    log.warn({ allocationId: workload.allocationId }, "not in the desired state any more: it is removed");
    put({ ...workload, target: WorkloadDesired_Target.RECLAIMED });
  }

  function apply(document: DesiredState): void {
    const wanted = new Map(document.workloads.map((workload) => [workload.allocationId, workload]));
    for (const [allocationId, workload] of workloads) {
      if (wanted.has(allocationId) || orphans.has(allocationId)) continue;
      if (workload.observed().phase === Phase.CLEAN) {
        workloads.delete(allocationId);
        parts().context.records.delete(allocationId);
        void workload.stop();
      } else {
        orphan(workload.desired());
      }
    }
    for (const workload of wanted.values()) {
      orphans.delete(workload.allocationId);
      put(workload);
    }
    // Drain may have ended, and a GPU may be free for another one now.
    for (const workload of workloads.values()) workload.kick();
    changed();
  }

  /** Runs whenever the engine begins to answer, before any workload is acted on. */
  async function takeStock(context: WorkloadContext): Promise<void> {
    if (!desired) return;
    for (const container of await client.list([`${labelNames.owner}=${context.ownerId}`])) {
      const labels = readLabels(container.labels);
      if (!labels) continue;
      context.gate.adopt(labels.allocationId, labels.gpuUuids);
      if (workloads.has(labels.allocationId)) {
        if (container.state === "running") {
          log.info({ allocationId: labels.allocationId, containerId: container.id }, "container adopted");
        }
      } else {
        orphan({
          allocationId: labels.allocationId,
          tenantId: container.labels[labelNames.tenant] ?? "",
          target: WorkloadDesired_Target.RECLAIMED,
          gpuUuids: [...labels.gpuUuids],
          container: undefined,
        });
      }
    }
    // What an interrupted release left when its container was gone already: volumes, GPUs not yet verified.
    const left = new Map<string, readonly string[]>();
    for (const allocationId of await readdir(context.volumes.root)) left.set(allocationId, []);
    for (const [allocationId, record] of context.records.entries()) {
      if (record.gpuUuids.length > 0) left.set(allocationId, record.gpuUuids);
      else if (!workloads.has(allocationId) && !left.has(allocationId)) context.records.delete(allocationId);
    }
    for (const [allocationId, gpuUuids] of left) {
      if (workloads.has(allocationId)) continue;
      orphan({
        allocationId,
        tenantId: "",
        target: WorkloadDesired_Target.RECLAIMED,
        gpuUuids: [...gpuUuids],
        container: undefined,
      });
    }
  }

  async function accept(document: DesiredState, serverId: string | undefined): Promise<void> {
    const { store, watch } = parts();
    // A host that enrolled anew is another server, whose generations begin at 0.
    const sameServer = serverId === undefined || desiredFor === undefined || serverId === desiredFor;
    const sameOrder = sameServer && desired?.incarnation === document.incarnation;
    if (sameOrder && desired !== undefined && document.generation < desired.generation) {
      log.warn(
        { held: desired.generation, offered: document.generation },
        "a lower generation of the desired state was ignored",
      );
      return;
    }
    const validDocument = validated(document);
    let failure: unknown;
    try {
      await store.save({ desired: validDocument, serverId: serverId ?? desiredFor });
      onDisk = { incarnation: document.incarnation, generation: document.generation };
    } catch (error) {
      // Tenants fill disks: a release must not wait for the room that it would make.
      failure = error;
    }
    stored = failure === undefined;
    const first = desired === undefined;
    desired = document;
    desiredFor = serverId ?? desiredFor;
    // Without a document no running container was looked at: that comes before anything is started.
    if (first) watch.begin();
    apply(document);
    if (failure !== undefined) throw failure;
  }

  async function* readLogs(
    request: Parameters<Reconciler["logs"]>[0],
    signal: AbortSignal,
  ): AsyncGenerator<LogChunk> {
    const { context } = parts();
    const found = await client.list([
      `${labelNames.allocation}=${request.allocationId}`,
      `${labelNames.owner}=${context.ownerId}`,
    ]);
    const container = found.find(({ state }) => state === "running") ?? found[0];
    if (!container) {
      throw new PlatformError({
        code: "workload-not-found",
        kind: "not-found",
        message: `there is no container of allocation ${request.allocationId} on this server`,
        hint: "It was not started yet, or it is gone already.",
      });
    }
    const frames = await client.logs(
      container.id,
      {
        follow: request.follow,
        tailLines: request.tailLines,
        sinceUnixMs: request.sinceUnixMs,
        timestamps: request.timestamps,
      },
      signal,
    );
    for await (const frame of frames) {
      const stream = frame.stream === "stderr" ? LogChunk_Stream.STDERR : LogChunk_Stream.STDOUT;
      yield { stream, data: frame.data };
    }
  }

  return {
    async start() {
      await mkdir(dataDir, { recursive: true, mode: 0o700 });
      await chmod(dataDir, 0o700);
      const disk = await createDiskReserve({ dir: dataDir, clock, log, onChanged: changed });
      const context: WorkloadContext = {
        client,
        volumes: await createVolumeStore(dataDir),
        images: await createImageAccess(dataDir, disk),
        gate: createGpuGate(() => {
          for (const workload of workloads.values()) workload.kick();
        }),
        records: await createRecordStore(dataDir, log, disk),
        gpuMonitor: options.gpuMonitor,
        clock,
        log,
        random,
        timings,
        ownerId: options.ownerId ?? (await loadOwnerId(dataDir)),
        network,
        allowedRegistries: options.engineOptions.allowedRegistries ?? [],
        publishAddress: options.engineOptions.publishAddress ?? "0.0.0.0",
        deviceDir: options.engineOptions.deviceDir ?? "/dev",
        facts: () => started?.watch.current(),
        incarnation: () => desired?.incarnation ?? "",
        draining: () => desired?.drain ?? false,
        stored: () => stored,
        emit,
      };
      const store = await createDesiredStore(dataDir, log, disk);
      const watch = createEngineWatch({
        client,
        gpuModeOverride: options.engineOptions.gpuMode,
        pingMs: timings.enginePingMs,
        clock,
        log,
        random,
        onConnected: () => takeStock(context),
        onContainerEvent: (allocationId) => workloads.get(allocationId)?.kick(),
        onReady() {
          for (const workload of workloads.values()) workload.engineReturned();
        },
        onChanged: changed,
      });
      started = { store, context, watch, disk };
      const held = await store.load();
      desired = held?.desired;
      desiredFor = held?.serverId;
      if (desired) onDisk = { incarnation: desired.incarnation, generation: desired.generation };
      if (desired) apply(desired);
      await watch.start();
    },
    async stop() {
      stopped = true;
      clearTimeout(telling);
      if (started) {
        await accepting;
        await started.watch.stop();
        // A container's grace may be an hour: after a few seconds calls are cut, the next start goes on there.
        const cut = setTimeout(() => client.close(), 5000);
        await Promise.all([...workloads.values()].map((workload) => workload.stop()));
        clearTimeout(cut);
        await started.context.records.flush();
      }
      client.close();
    },
    setDesired(document, serverId) {
      const taken = accepting.then(() => accept(document, serverId));
      accepting = taken.catch(() => undefined);
      return taken;
    },
    held: () => onDisk,
    observed,
    onObserved(listener) {
      observedListeners.add(listener);
      return () => observedListeners.delete(listener);
    },
    onEvent(listener) {
      eventListeners.add(listener);
      return () => eventListeners.delete(listener);
    },
    engine: () => started?.watch.last()?.engine,
    conditions,
    logs: readLogs,
  };
}
