import { execFile } from "node:child_process";
import { mkdir, mkdtemp, rm } from "node:fs/promises";
import { join } from "node:path";
import { tmpdir } from "node:os";
import { promisify } from "node:util";
import { systemClock } from "@palebluedot/shared/clock.ts";
import {
  type ContainerSpec,
  ContainerSpec_PullPolicy,
  DesiredState,
  GpuInventory,
  WorkloadDesired,
  WorkloadDesired_Target,
  WorkloadObserved_Phase,
  type GpuHolder,
  type WorkloadObserved,
} from "@palebluedot/shared/generated/palebluedot/agent/v1/agent.ts";
import { createLogger } from "@palebluedot/shared/logger.ts";
import type { GpuMonitor } from "../../gpu/types.ts";
import type { EngineOptions, ReconcilerTimings } from "../options.ts";
import { createReconciler } from "../reconciler.ts";
import type { Reconciler, WorkloadEvent } from "../types.ts";

const run = promisify(execFile);

/** GPUs whose occupation a test sets; answers like the real monitor. */
interface FakeGpus extends Pick<GpuMonitor, "holders" | "snapshot"> {
  readonly uuids: readonly string[];
  readonly occupied: Map<string, GpuHolder[]>;
  /** Set: nvidia-smi does not answer. */
  unknownReason: string | undefined;
}

const madeUpUuids = (count: number): string[] =>
  Array.from({ length: count }, (_, index) => `GPU-00000000-0000-4000-8000-00000000000${index}`);

function createFakeGpus(uuids: readonly string[]): FakeGpus {
  const count = uuids.length;
  const gpus = uuids.map((uuid, index) =>
    // Minor numbers in another order than the indexes, as on real servers.
    GpuInventory.fromPartial({ uuid, index, model: "NVIDIA H100", minorNumber: count - 1 - index }),
  );
  const fake: FakeGpus = {
    uuids,
    occupied: new Map(),
    unknownReason: undefined,
    snapshot: () => ({ gpus, conditions: [], takenAtUnixMs: Date.now() }),
    holders: (wanted) =>
      Promise.resolve(
        fake.unknownReason === undefined
          ? { kind: "known", holders: wanted.flatMap((uuid) => fake.occupied.get(uuid) ?? []) }
          : { kind: "unknown", reason: fake.unknownReason },
      ),
  };
  return fake;
}

/** Nodes that real containers can open: character devices of /dev/null's number under NVIDIA's names. */
export async function makeDeviceNodes(dir: string, names: readonly string[]): Promise<void> {
  await mkdir(dir, { recursive: true });
  for (const name of names) await run("mknod", ["-m", "666", join(dir, name), "c", "1", "3"]);
}

export async function eventually<T>(
  what: string,
  look: () => T | undefined | Promise<T | undefined>,
  deadlineMs = 20_000,
): Promise<T> {
  const end = Date.now() + deadlineMs;
  for (;;) {
    const value = await look();
    if (value !== undefined) return value;
    if (Date.now() > end) throw new Error(`not in ${deadlineMs} ms: ${what}`);
    await new Promise((resolve) => setTimeout(resolve, 20));
  }
}

type DeepPartialSpec = Parameters<typeof ContainerSpec.fromPartial>[0];

export function workload(
  allocationId: string,
  container: DeepPartialSpec,
  extra: { gpuUuids?: readonly string[]; reclaimed?: boolean; tenantId?: string } = {},
): WorkloadDesired {
  return WorkloadDesired.fromPartial({
    allocationId,
    tenantId: extra.tenantId ?? "tenant-a",
    target: extra.reclaimed === true ? WorkloadDesired_Target.RECLAIMED : WorkloadDesired_Target.RUNNING,
    gpuUuids: [...(extra.gpuUuids ?? [])],
    container: {
      image: "pbd-test",
      stopGraceSeconds: 1,
      pullPolicy: ContainerSpec_PullPolicy.NEVER,
      ...container,
    },
  });
}

export const document = (
  generation: number,
  workloads: readonly WorkloadDesired[],
  extra: { drain?: boolean; incarnation?: string } = {},
): DesiredState =>
  DesiredState.fromPartial({
    incarnation: extra.incarnation ?? "incarnation-1",
    generation,
    drain: extra.drain ?? false,
    workloads: [...workloads],
  });

const fastTimings: ReconcilerTimings = {
  engineCallMs: 10_000,
  enginePingMs: 300,
  resyncMs: 1500,
  pullStallMs: 3000,
  retryBaseMs: 50,
  verifyMs: 400,
  verifyPollMs: 50,
};

export interface Stand {
  readonly dataDir: string;
  readonly deviceDir: string;
  readonly gpus: FakeGpus;
  readonly events: WorkloadEvent[];
  reconciler: Reconciler;
  /** Stops the reconciler, if it runs, and starts a new one on the same directory. */
  restart(): Promise<void>;
  of(allocationId: string): WorkloadObserved | undefined;
  phase(
    allocationId: string,
    phase: keyof typeof WorkloadObserved_Phase,
    reason?: string,
    deadlineMs?: number,
  ): Promise<WorkloadObserved>;
  close(): Promise<void>;
}

/** A reconciler on an engine, with a directory, device nodes and GPUs of its own. */
export async function createStand(options: {
  readonly dockerHost: string;
  /** Default: four made-up ones. */
  readonly gpuUuids?: readonly string[];
  readonly engine?: Partial<EngineOptions>;
  readonly timings?: ReconcilerTimings;
}): Promise<Stand> {
  const dataDir = await mkdtemp(join(tmpdir(), "pbd-agent-"));
  const deviceDir = join(dataDir, "dev");
  const gpus = createFakeGpus(options.gpuUuids ?? madeUpUuids(4));
  const events: WorkloadEvent[] = [];
  const log = createLogger({ name: "reconciler", level: process.env["PALEBLUEDOT_TEST_LOG"] ?? "silent" });
  const make = (): Reconciler => {
    const made = createReconciler({
      dataDir,
      engineOptions: {
        dockerHost: options.dockerHost,
        deviceDir,
        network: "none",
        allowedRegistries: ["127.0.0.1:9"],
        ...options.engine,
      },
      gpuMonitor: gpus,
      clock: systemClock,
      log,
      timings: { ...fastTimings, ...options.timings },
    });
    made.onEvent((event) => events.push(event));
    return made;
  };
  let running = false;
  const stand: Stand = {
    dataDir,
    deviceDir,
    gpus,
    events,
    reconciler: make(),
    async restart() {
      if (running) {
        await stand.reconciler.stop();
        stand.reconciler = make();
      }
      running = true;
      await stand.reconciler.start();
    },
    of: (allocationId) =>
      stand.reconciler.observed().workloads.find((one) => one.allocationId === allocationId),
    async phase(allocationId, phase, reason, deadlineMs) {
      try {
        return await eventually(
          `${allocationId} ${phase} ${reason ?? ""}`,
          () => {
            const seen = stand.of(allocationId);
            const matches =
              seen?.phase === WorkloadObserved_Phase[phase] &&
              (reason === undefined || seen.reason === reason);
            return matches ? seen : undefined;
          },
          deadlineMs,
        );
      } catch (error) {
        throw new Error(`${String(error)}; seen: ${JSON.stringify(stand.of(allocationId))}`, {
          cause: error,
        });
      }
    },
    async close() {
      if (running) {
        const { incarnation, generation } = stand.reconciler.held();
        // Leaves nothing behind on an engine that others use.
        if (incarnation !== "")
          await stand.reconciler.setDesired(document(generation + 1, [], { incarnation }));
        await stand.reconciler.stop();
      }
      await rm(dataDir, { recursive: true, force: true });
    },
  };
  return stand;
}

/** All of a container's output so far. */
export async function output(reconciler: Reconciler, allocationId: string, follow = false): Promise<string> {
  const chunks: Buffer[] = [];
  const request = { streamId: "s", allocationId, follow, tailLines: 0, sinceUnixMs: 0, timestamps: false };
  for await (const chunk of reconciler.logs(request, AbortSignal.timeout(20_000))) {
    chunks.push(Buffer.from(chunk.data));
  }
  return Buffer.concat(chunks).toString();
}
