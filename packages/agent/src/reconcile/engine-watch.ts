import { fullJitterMs } from "@palebluedot/shared/backoff.ts";
import type { Clock } from "@palebluedot/shared/clock.ts";
import { errorMessage } from "@palebluedot/shared/errors.ts";
import {
  Condition_Status,
  type Condition,
  type ContainerEngine,
} from "@palebluedot/shared/generated/palebluedot/agent/v1/agent.ts";
import type { Logger } from "@palebluedot/shared/logger.ts";
import { labelNames } from "../containers/create-request.ts";
import {
  describeEngine,
  detectGpuMode,
  readCdiSpecification,
  type CdiSpecification,
} from "../containers/detect.ts";
import type { ContainerEngineClient } from "../containers/engine.ts";
import type { EngineCapacity } from "../containers/host-share.ts";
import type { GpuMode } from "./options.ts";

export interface EngineFacts {
  readonly engine: ContainerEngine;
  readonly gpuMode: GpuMode;
  readonly cdi: CdiSpecification | undefined;
  readonly capacity: EngineCapacity;
}

/** Knows whether the engine answers, and tells of container events at once. Unknown is not "gone". */
export interface EngineWatch {
  /** Resolves after the first look, whatever it found. */
  start(): Promise<void>;
  stop(): Promise<void>;
  /** Facts while the engine answers; undefined while it does not. */
  current(): EngineFacts | undefined;
  /** The facts of the engine that answered last, also while it is away. */
  last(): EngineFacts | undefined;
  condition(): Condition;
  /** Somebody's call failed: look now. */
  doubt(): void;
  /** Takes the engine for away at once and connects anew, so that `onConnected` runs before anything else. */
  begin(): void;
}

export interface EngineWatchOptions {
  readonly client: ContainerEngineClient;
  readonly gpuModeOverride: GpuMode | undefined;
  readonly pingMs: number;
  readonly clock: Clock;
  readonly log: Logger;
  readonly random: () => number;
  /** The engine answers (again). Must succeed before anything is acted on. */
  readonly onConnected: (facts: EngineFacts) => Promise<void>;
  /** `current` tells the facts from now on. */
  readonly onReady: () => void;
  readonly onContainerEvent: (allocationId: string) => void;
  readonly onChanged: () => void;
}

export function createEngineWatch(options: EngineWatchOptions): EngineWatch {
  const { client, clock, log } = options;
  const stopping = new AbortController();
  let facts: EngineFacts | undefined;
  let lastFacts: EngineFacts | undefined;
  let condition: Condition = {
    component: "container-engine",
    status: Condition_Status.UNKNOWN,
    reason: "not-asked-yet",
    message: "",
    sinceUnixMs: clock.now(),
  };
  let wake: (() => void) | undefined;
  let running: Promise<void> | undefined;
  let following: AbortController | undefined;
  let beginAnew = false;
  let looked: (() => void) | undefined;

  function report(status: Condition["status"], reason: string, message: string): void {
    if (condition.status === status && condition.reason === reason && condition.message === message) return;
    // "Since" is when the judgement changed, not when its wording did.
    const since =
      condition.status === status && condition.reason === reason ? condition.sinceUnixMs : clock.now();
    condition = { component: "container-engine", status, reason, message, sinceUnixMs: since };
    options.onChanged();
  }

  async function connect(): Promise<void> {
    beginAnew = false;
    const version = await client.version();
    const info = await client.info();
    const cdi = await readCdiSpecification(info.CDISpecDirs ?? []);
    const gpuMode = options.gpuModeOverride ?? detectGpuMode(version, info, cdi);
    const capacity = { memoryBytes: info.MemTotal ?? 0, cpus: info.NCPU ?? 0 };
    const fresh = { engine: describeEngine(version, gpuMode), gpuMode, cdi, capacity };
    await options.onConnected(fresh);
    if (beginAnew) throw new Error("asked to begin anew");
    facts = fresh;
    lastFacts = fresh;
    log.info({ engine: fresh.engine }, "container engine answers");
    report(Condition_Status.OK, "", "");
    options.onReady();
  }

  /** Follows events and pings until one of them fails. Always ends with an error. */
  async function follow(): Promise<never> {
    const ended = new AbortController();
    following = ended;
    const signal = AbortSignal.any([ended.signal, stopping.signal]);
    async function readEvents(): Promise<never> {
      for await (const event of await client.events(labelNames.allocation, signal)) {
        const allocationId = event.attributes[labelNames.allocation];
        if (allocationId !== undefined) options.onContainerEvent(allocationId);
      }
      throw new Error("the engine ended its event stream");
    }
    async function ping(): Promise<never> {
      for (;;) {
        await Promise.race([
          clock.sleep(options.pingMs, signal),
          new Promise<void>((resolve) => (wake = resolve)),
        ]);
        signal.throwIfAborted();
        await client.ping();
      }
    }
    try {
      return await Promise.race([readEvents(), ping()]);
    } finally {
      ended.abort(new Error("the engine watch begins anew"));
    }
  }

  async function run(): Promise<void> {
    let failures = 0;
    while (!stopping.signal.aborted) {
      try {
        await connect();
        looked?.();
        failures = 0;
        await follow();
      } catch (error) {
        if (stopping.signal.aborted) return;
        facts = undefined;
        if (beginAnew) continue;
        log.warn({ reason: errorMessage(error) }, "container engine does not answer");
        report(Condition_Status.FAILED, "unresponsive", errorMessage(error).slice(0, 500));
        looked?.();
        const pauseMs = fullJitterMs(
          failures,
          { baseMs: options.pingMs / 8, capMs: options.pingMs },
          options.random,
        );
        failures += 1;
        await clock.sleep(pauseMs + 10, stopping.signal).catch(() => undefined);
      }
    }
  }

  return {
    async start() {
      const first = new Promise<void>((resolve) => (looked = resolve));
      running = run();
      await first;
    },
    async stop() {
      stopping.abort(new Error("stopped"));
      await running;
    },
    current: () => facts,
    last: () => lastFacts,
    condition: () => condition,
    doubt: () => wake?.(),
    begin() {
      facts = undefined;
      beginAnew = true;
      following?.abort(new Error("the engine watch begins anew"));
    },
  };
}
