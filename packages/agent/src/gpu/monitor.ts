import type { GpuSample } from "@palebluedot/shared/generated/palebluedot/agent/v1/agent.ts";
import { systemClock } from "@palebluedot/shared/clock.ts";
import { errorMessage } from "@palebluedot/shared/errors.ts";
import { xidIsFatalToGpu } from "@palebluedot/shared/xid-catalog.ts";
import { fullJitterMs } from "@palebluedot/shared/backoff.ts";
import { readBoot } from "./boot.ts";
import { ABSENT, createConditionSet, DEGRADED, FAILED, OK, UNKNOWN } from "./conditions.ts";
import { judgeGpu, recoveryAction } from "./gpu-health.ts";
import { findHolders } from "./holders.ts";
import { loadIdleMemory, type IdleMemory } from "./idle-memory.ts";
import { createKernelLogFollower, type KernelLogFollower } from "./kernel-log-follower.ts";
import type { KernelGpuEvent } from "./kernel-log.ts";
import { loadKnownGpus, saveKnownGpus } from "./known-gpus.ts";
import { createListeners } from "./listeners.ts";
import { nvidiaPciDevices } from "./pci-devices.ts";
import { readPlacement } from "./placement.ts";
import { toInventory, toSample, withSlowFacts, type GpuReading, type PlacementFacts } from "./reading.ts";
import { stuckMessage, unreachableGpus, type SmiFailure } from "./smi-failure.ts";
import { createSmiRunner } from "./smi-runner.ts";
import { createSmiStream } from "./smi-stream.ts";
import type { GpuMonitorOptions, GpuMonitorWithReadings, TimedReading } from "./monitor-types.ts";
import type { GpuEvent, GpuSnapshot } from "./types.ts";

export type { GpuMonitorOptions, GpuMonitorWithReadings } from "./monitor-types.ts";

import { pciBusId } from "./values.ts";
import { readSmiDocument, type SmiLook } from "./smi-document.ts";
import { createXidEvents } from "./xid-events.ts";

/** Looks because of an event are at least this far apart: one costs up to 0.6 s of a core. */
const lookSpacingMs = 5000;

export function createGpuMonitor(options: GpuMonitorOptions): GpuMonitorWithReadings {
  const { log } = options;
  const clock = options.clock ?? systemClock;
  const random = options.random ?? Math.random;
  const intervalMs = Math.max(1000, options.intervalMs ?? 10_000);
  const slowIntervalMs = options.slowIntervalMs ?? 300_000;
  const queryDeadlineMs = options.queryDeadlineMs ?? 30_000;
  const documentDeadlineMs = options.documentDeadlineMs ?? 60_000;
  const sysfsRoot = options.sysfsRoot ?? "/sys";
  const procRoot = options.procRoot ?? "/proc";

  const runner = createSmiRunner({
    path: options.nvidiaSmiPath,
    env: options.env ?? process.env,
    clock,
    log,
    killGraceMs: options.killGraceMs,
    kill: options.kill,
  });
  const conditions = createConditionSet(clock);
  const samples = createListeners<readonly GpuSample[]>(log, "samples");
  const snapshots = createListeners<GpuSnapshot>(log, "snapshot");
  const events = createListeners<GpuEvent>(log, "event");

  /** Slow facts by UUID; a GPU that was seen once stays, so that a lost one is reported and not forgotten. */
  const known = new Map<string, GpuReading>();
  const placement = new Map<string, PlacementFacts>();
  const fast = new Map<string, TimedReading>();
  const lost = new Set<string>();
  const fatalXids = new Map<string, number>();
  const lastXids = new Map<string, number>();
  let idle: IdleMemory | undefined;
  let follower: KernelLogFollower | undefined;
  let bootTimeUnixMs: number | undefined;
  let bootId = "";
  let takenAtUnixMs = 0;
  let control: AbortController | undefined;
  let starting: Promise<void> = Promise.resolve();
  let slowLoop: Promise<void> = Promise.resolve();
  const pauses = new Set<symbol>();
  let streamTurn: Promise<void> = Promise.resolve();
  let wake: (() => void) | undefined;

  const xidEvents = createXidEvents(clock, () => bootTimeUnixMs);
  const stream = createSmiStream({
    runner,
    clock,
    log,
    random,
    intervalMs,
    silenceMs: options.silenceMs ?? 30_000,
    backoff: options.backoff ?? { baseMs: 1000, capMs: 60_000 },
    select: () => reachable(),
    onReadings: (readings) => {
      onReadings(readings);
    },
    onFailure: (failure) => {
      if (pauses.size === 0) void note(failure);
    },
    onOtherLine: (line) => {
      markUnreachable(line);
    },
  });

  const snapshot = (): GpuSnapshot => ({
    gpus: [...known.values()]
      .map((reading) => toInventory(reading, placement.get(reading.uuid ?? "")))
      .filter((gpu) => gpu !== undefined)
      .sort((a, b) => a.index - b.index),
    conditions: conditions.list(),
    takenAtUnixMs,
  });
  /** The GPUs that are left when some are lost; empty: no need to choose. */
  const reachable = (): string[] =>
    lost.size === 0 ? [] : [...known.keys()].filter((uuid) => !lost.has(uuid));
  const tellSnapshot = (): void => {
    snapshots.tell(snapshot());
  };
  const tellEvent = (type: string, gpuUuid: string, message: string, data: GpuEvent["data"]): void => {
    events.tell({ type, gpuUuid, message, timeUnixMs: clock.now(), data });
  };
  const component = (uuid: string): string => `gpu-${String(known.get(uuid)?.index ?? uuid)}`;

  /** Keeps the conditions of tool and driver; undefined: nvidia-smi answered. */
  const noteAnswer = (failure: SmiFailure | undefined): void => {
    let changed: boolean;
    if (failure === undefined) {
      const stuck = [...runner.abandoned()];
      changed =
        stuck.length === 0
          ? conditions.set("nvidia-smi", OK, "ok", "")
          : conditions.set("nvidia-smi", DEGRADED, "child-stuck", stuckMessage(stuck));
      changed =
        (lost.size === 0
          ? conditions.set("gpu-driver", OK, "ok", "")
          : conditions.set("gpu-driver", DEGRADED, "gpu-lost", `${String(lost.size)} GPUs are lost`)) ||
        changed;
    } else if (failure.reason === "gpu-lost" && known.size > 0) {
      // One GPU's fault, told by its own condition; the driver goes on serving the others.
      markUnreachable(failure.message);
      changed = conditions.set("gpu-driver", DEGRADED, failure.reason, failure.message);
      changed = conditions.set("nvidia-smi", OK, "ok", "") || changed;
    } else if (failure.component === "nvidia-smi") {
      changed = conditions.set("nvidia-smi", FAILED, failure.reason, failure.message);
      changed = conditions.set("gpu-driver", UNKNOWN, failure.reason, "nvidia-smi does not tell") || changed;
    } else {
      changed = conditions.set("nvidia-smi", OK, "ok", "");
      changed = conditions.set("gpu-driver", FAILED, failure.reason, failure.message) || changed;
    }
    if (changed) tellSnapshot();
  };

  /** A host without GPUs has no fault: told apart by what sits on the PCI bus. */
  const noteAbsence = async (failure: SmiFailure): Promise<boolean> => {
    if (!["nvidia-smi-missing", "no-devices"].includes(failure.reason) || known.size > 0) return false;
    const devices = await nvidiaPciDevices(sysfsRoot);
    if (devices === undefined || devices.length > 0) return false;
    const changed = [
      conditions.set("gpu-driver", ABSENT, "no-gpu", "this host has no NVIDIA GPU on its PCI bus"),
      conditions.set("nvidia-smi", ABSENT, failure.reason, failure.message),
    ];
    if (changed.includes(true)) tellSnapshot();
    return true;
  };

  const note = async (failure: SmiFailure | undefined): Promise<void> => {
    if (failure === undefined || !(await noteAbsence(failure))) noteAnswer(failure);
  };

  const markLost = (uuid: string, why: string): void => {
    if (lost.has(uuid)) return;
    lost.add(uuid);
    fast.delete(uuid);
    conditions.set(component(uuid), FAILED, "gpu-lost", why);
    tellEvent("gpu.lost", uuid, `${component(uuid)} is lost: ${why}`, {
      index: known.get(uuid)?.index,
      pci: known.get(uuid)?.pciBusId,
    });
    tellSnapshot();
    wake?.();
  };

  const markUnreachable = (text: string): void => {
    for (const address of unreachableGpus(text)) {
      const gpu = byPci(address);
      if (gpu?.uuid !== undefined) markLost(gpu.uuid, text);
    }
  };

  const byPci = (address: string): GpuReading | undefined => {
    const full = pciBusId(address);
    return full === undefined ? undefined : [...known.values()].find((reading) => reading.pciBusId === full);
  };

  const onReadings = (readings: readonly GpuReading[]): void => {
    const now = clock.now();
    const batch: GpuSample[] = [];
    for (const reading of readings) {
      const uuid = reading.uuid ?? byIndex(reading.index)?.uuid;
      if (uuid === undefined) continue;
      const slow = known.get(uuid);
      if (reading.lost === true) {
        if (slow !== undefined) markLost(uuid, "nvidia-smi says: GPU is lost");
        continue;
      }
      if (slow === undefined) {
        // A GPU that the last document did not hold: the document is out of date.
        wake?.();
      } else if (slow.index !== reading.index && reading.index !== undefined) {
        // Only this output tells the index; the document has just an order.
        known.set(uuid, { ...slow, index: reading.index });
      }
      const action = recoveryAction(reading);
      if (action !== undefined && slow !== undefined && action !== recoveryAction(slow)) wake?.();
      fast.set(uuid, { reading: { ...reading, uuid }, takenAtUnixMs: now });
      batch.push(toSample(reading, uuid, now));
    }
    if (batch.length > 0) samples.tell(batch);
  };

  const byIndex = (index: number | undefined): GpuReading | undefined =>
    index === undefined ? undefined : [...known.values()].find((reading) => reading.index === index);

  const applyDocument = async (document: SmiLook): Promise<void> => {
    const { complete } = document;
    const newcomers = document.gpus.some((gpu) => gpu.uuid !== undefined && !placement.has(gpu.uuid));
    const seen = new Set<string>();
    for (const gpu of document.gpus) {
      const uuid = gpu.uuid ?? byPci(gpu.pciBusId ?? "")?.uuid;
      if (uuid === undefined || seen.has(uuid)) continue;
      if (gpu.lost === true && known.has(uuid)) {
        markLost(uuid, "nvidia-smi says: GPU is lost");
        seen.add(uuid);
        continue;
      }
      seen.add(uuid);
      const before = known.get(uuid);
      // With a GPU missing the order of the document shifts: what was learned from the index column stays.
      const index = complete && before === undefined ? gpu.index : (before?.index ?? gpu.index);
      const current: GpuReading = { ...gpu, uuid, index, model: gpu.model ?? before?.model };
      known.set(uuid, current);
      lost.delete(uuid);
      noteGpu(uuid, current, before);
      if (gpu.processes?.length === 0 && gpu.memoryUsedBytes !== undefined) {
        idle?.learn(uuid, gpu.memoryUsedBytes, gpu.memoryTotalBytes);
      }
    }
    for (const address of document.unreachable) {
      const uuid = byPci(address)?.uuid;
      if (uuid !== undefined) markLost(uuid, "nvidia-smi cannot open it");
      else conditions.set(`gpu-${address}`, FAILED, "gpu-lost", "nvidia-smi cannot open it");
    }
    for (const uuid of known.keys()) {
      if (complete && !seen.has(uuid)) markLost(uuid, "nvidia-smi does not list it any more");
    }
    takenAtUnixMs = clock.now();
    const facts = await readPlacement({
      runner,
      sysfsRoot,
      gpus: [...known.values()],
      newcomers,
      queryDeadlineMs,
    });
    for (const [uuid, fact] of facts.placement) placement.set(uuid, { ...placement.get(uuid), ...fact });
    for (const [uuid, devices] of facts.migDevices) {
      const gpu = known.get(uuid);
      if (gpu !== undefined) known.set(uuid, { ...gpu, migDevices: devices });
    }
    await idle?.save();
    if (complete) await saveKnownGpus(options.stateDir, bootId, [...known.values()]);
  };

  const noteGpu = (uuid: string, current: GpuReading, before: GpuReading | undefined): void => {
    const action = recoveryAction(current);
    // Only the driver's own word ends the verdict of a fatal Xid.
    if (action === "none" && current.recoveryAction !== undefined) fatalXids.delete(uuid);
    const xid = fatalXids.get(uuid);
    const verdict = judgeGpu(current);
    if (xid !== undefined && verdict.status !== FAILED) {
      conditions.set(
        component(uuid),
        FAILED,
        `xid-${String(xid)}`,
        `Xid ${String(xid)} needs a reset or repair`,
      );
    } else {
      conditions.set(component(uuid), verdict.status, verdict.reason, verdict.message);
    }
    const previous = before === undefined ? "none" : recoveryAction(before);
    if (action !== undefined && action !== previous && (action !== "none" || before !== undefined)) {
      tellEvent("gpu.recovery-action", uuid, `${component(uuid)}: recovery action is now ${action}`, {
        action,
        previous,
        index: current.index,
      });
    }
    const errors = current.eccUncorrectedVolatile;
    if (errors !== undefined && errors > (before?.eccUncorrectedVolatile ?? 0)) {
      tellEvent("gpu.ecc-uncorrected", uuid, `${component(uuid)}: ${String(errors)} uncorrected ECC errors`, {
        total: errors,
        previous: before?.eccUncorrectedVolatile,
        index: current.index,
      });
    }
  };

  const onKernelEvent = (kernel: KernelGpuEvent): void => {
    const gpu = kernel.kind === "sxid" ? undefined : byPci(kernel.pciBusId);
    const uuid = gpu?.uuid ?? "";
    if (kernel.kind === "xid" && kernel.number !== undefined && uuid !== "") {
      lastXids.set(uuid, kernel.number);
      if (xidIsFatalToGpu(kernel.number)) {
        fatalXids.set(uuid, kernel.number);
        conditions.set(
          component(uuid),
          FAILED,
          `xid-${String(kernel.number)}`,
          `Xid ${String(kernel.number)}: ${kernel.message}`,
        );
        tellSnapshot();
      }
    }
    if (kernel.kind === "fallen-off-bus" && uuid !== "") {
      markLost(uuid, kernel.message);
      return;
    }
    const event = xidEvents.from(kernel, uuid);
    if (event === undefined) return;
    events.tell(event);
    wake?.();
  };

  /** nvidia-smi stopped at a lost GPU: those after it are asked for by name or PCI address. */
  const lookAtTheOthers = async (document: SmiLook): Promise<void> => {
    const unreachable = new Set(document.unreachable.map((address) => pciBusId(address)));
    const unseen = ((await nvidiaPciDevices(sysfsRoot)) ?? []).filter(
      (address) => byPci(address) === undefined && !unreachable.has(pciBusId(address)),
    );
    const rest = [...[...known.keys()].filter((uuid) => !lost.has(uuid)), ...unseen];
    if (rest.length <= document.gpus.length) return;
    const others = await readSmiDocument(runner, documentDeadlineMs, rest);
    if ("gpus" in others) await applyDocument(others);
  };

  // One look at a time; a caller during one gets the next, because that one may have begun too early.
  let failedLooks = 0;
  let lookedAtMs = 0;
  let looking: Promise<GpuSnapshot> | undefined;
  let next: Promise<GpuSnapshot> | undefined;
  const look = async (): Promise<GpuSnapshot> => {
    const document = await readSmiDocument(runner, documentDeadlineMs);
    const answered = "gpus" in document;
    if (answered) await applyDocument(document);
    await note(answered ? undefined : document);
    if (answered && !document.complete) await lookAtTheOthers(document);
    failedLooks = answered ? 0 : failedLooks + 1;
    lookedAtMs = clock.now();
    tellSnapshot();
    return snapshot();
  };
  const refresh = (): Promise<GpuSnapshot> => {
    if (looking === undefined) {
      looking = look().finally(() => {
        looking = undefined;
      });
      return looking;
    }
    next ??= looking
      .catch(() => undefined)
      .then(() => {
        next = undefined;
        return refresh();
      });
    return next;
  };

  const slow = async (signal: AbortSignal): Promise<void> => {
    while (!signal.aborted) {
      const woken = new AbortController();
      const onStop = (): void => {
        woken.abort();
      };
      signal.addEventListener("abort", onStop, { once: true });
      let lookSoon = false;
      wake = () => {
        lookSoon = true;
        woken.abort();
      };
      const delayMs =
        failedLooks === 0
          ? slowIntervalMs
          : 1000 + fullJitterMs(failedLooks, { baseMs: 5000, capMs: slowIntervalMs }, random);
      await clock.sleep(Math.min(delayMs, slowIntervalMs), woken.signal).catch(() => undefined);
      signal.removeEventListener("abort", onStop);
      if (signal.aborted) return;
      if (lookSoon) {
        // A burst of Xids is one reason to look, and a driver in trouble needs no crowd.
        const spacingMs = Math.max(500, lookedAtMs + lookSpacingMs - clock.now());
        await clock.sleep(spacingMs, signal).catch(() => undefined);
      }
      if (signal.aborted) return;
      await refresh().catch((error: unknown) => {
        log.error({ error: errorMessage(error) }, "the slow GPU loop failed");
      });
    }
  };

  /** Starts and stops of the stream follow each other, whatever the callers' order of waiting. */
  const inTurn = (step: () => Promise<void> | void): Promise<void> => {
    streamTurn = streamTurn.then(step, step);
    return streamTurn;
  };

  const begin = async (signal: AbortSignal): Promise<void> => {
    const remembered = await loadIdleMemory(options.stateDir);
    idle ??= remembered;
    const boot = await readBoot(procRoot);
    bootTimeUnixMs = boot.timeUnixMs;
    bootId = boot.id;
    for (const gpu of await loadKnownGpus(options.stateDir, bootId)) {
      known.set(gpu.uuid ?? "", gpu);
      conditions.set(component(gpu.uuid ?? ""), UNKNOWN, "not-seen-yet", "known from before the restart");
    }
    for (const tool of ["nvidia-smi", "gpu-driver"]) {
      conditions.set(tool, UNKNOWN, "not-seen-yet", "nvidia-smi has not answered since the agent started");
    }
    await refresh();
    if (signal.aborted) return;
    await inTurn(() => {
      if (pauses.size === 0 && control !== undefined) stream.start();
    });
    if (options.kernelLogPath !== undefined) {
      follower = createKernelLogFollower({
        path: options.kernelLogPath,
        stateDir: options.stateDir,
        bootId,
        clock,
        log,
        pollMs: options.kernelLogPollMs ?? 1000,
        onEvent: onKernelEvent,
        onFailure: (message) => {
          const changed =
            message === undefined
              ? conditions.set("kernel-log", OK, "ok", "")
              : conditions.set("kernel-log", DEGRADED, "unreadable", message);
          if (changed) tellSnapshot();
        },
      });
      follower.start();
    }
    slowLoop = slow(signal);
  };

  return {
    intervalMs,
    start: () => {
      if (control === undefined) {
        control = new AbortController();
        starting = begin(control.signal);
      }
      return starting;
    },
    stop: async () => {
      control?.abort();
      control = undefined;
      // Whoever still waits for an answer of nvidia-smi gets none: its deadline may be a minute away.
      await Promise.all([runner.stop(), starting.catch(() => undefined)]);
      await Promise.all([follower?.stop(), inTurn(() => stream.stop()), slowLoop]);
      await runner.stop();
    },
    snapshot,
    latestSamples: () =>
      [...fast].map(([uuid, { reading, takenAtUnixMs: at }]) => toSample(reading, uuid, at)),
    latestReadings: () =>
      [...fast].map(([uuid, { reading, takenAtUnixMs: at }]) => ({
        reading: withSlowFacts(reading, known.get(uuid)),
        takenAtUnixMs: at,
      })),
    lastXids: () => lastXids,
    streamRestarts: () => stream.restarts(),
    onSamples: (listener) => samples.add(listener),
    onSnapshot: (listener) => snapshots.add(listener),
    onEvent: (listener) => events.add(listener),
    refresh,
    pause: async (reason) => {
      const token = Symbol(reason);
      pauses.add(token);
      log.info({ reason }, "GPU sampling paused");
      await inTurn(() => stream.stop());
      return () => {
        if (!pauses.delete(token) || pauses.size > 0) return;
        log.info({ reason }, "GPU sampling resumed");
        void inTurn(() => {
          if (pauses.size === 0 && control !== undefined) stream.start();
        });
      };
    },
    holders: async (gpuUuids) => {
      idle ??= await loadIdleMemory(options.stateDir);
      return findHolders(gpuUuids, {
        runner,
        idle,
        deadlineMs: queryDeadlineMs,
        document: (uuids) => readSmiDocument(runner, documentDeadlineMs, uuids),
      });
    },
  };
}
