import { stat } from "node:fs/promises";
import { fullJitterMs } from "@palebluedot/shared/backoff.ts";
import { errorMessage, isPlatformError } from "@palebluedot/shared/errors.ts";
import { parseImageReference } from "@palebluedot/shared/image-reference.ts";
import {
  ContainerSpec_PullPolicy,
  ContainerSpec_RestartPolicy,
  WorkloadObserved_Phase as Phase,
  type ContainerSpec,
  type GpuInventory,
} from "@palebluedot/shared/generated/palebluedot/agent/v1/agent.ts";
import {
  buildCreateRequest,
  containerName,
  controlNodeNames,
  deviceNodeOf,
  labelNames,
  readLabels,
} from "../containers/create-request.ts";
import type { ImageFacts, InspectedContainer } from "../containers/engine.ts";
import { hostShare } from "../containers/host-share.ts";
import { checkPolicy } from "../containers/policy.ts";
import { readOutputTail } from "./output-tail.ts";
import { again, backOff, settled, type Next, type WorkloadContext, type WorkloadState } from "./context.ts";
import type { EngineFacts } from "./engine-watch.ts";

const maxPullAttempts = 4;
const maxStartAttempts = 3;
/** A container that did run starts again in the end: an engine that shuts down refuses a few starts first. */
const maxRestartAttempts = 10;
/** A container that ran this long was well: its next exit backs off from the beginning. */
const wellAfterMs = 10 * 60_000;
/** A GPU that is not there for this long is taken for lost. */
const gpuMissingMs = 5 * 60_000;

const isRefused = (error: unknown, ...statuses: number[]): boolean =>
  isPlatformError(error) &&
  error.code === "container-engine-refused" &&
  (statuses.length === 0 || statuses.includes(error.status ?? 0));

function fail(state: WorkloadState, context: WorkloadContext, reason: string, message: string): Next {
  state.remember({ failure: { reason, message: message.slice(0, 1000) } });
  state.report({ phase: Phase.FAILED, reason, message: message.slice(0, 1000) });
  const type = reason.startsWith("refused-") ? "workload.refused" : "workload.failed";
  context.emit(type, state.allocationId, message.slice(0, 1000), { reason });
  return settled;
}

/** One look at a workload that should run, and the next step towards it. Calling it twice is safe. */
export async function runPass(
  state: WorkloadState,
  context: WorkloadContext,
  facts: EngineFacts,
  signal: AbortSignal,
): Promise<Next> {
  const { client } = context;
  const containers = await client.list([
    `${labelNames.allocation}=${state.allocationId}`,
    `${labelNames.owner}=${context.ownerId}`,
  ]);
  for (const container of containers) {
    context.gate.adopt(state.allocationId, readLabels(container.labels)?.gpuUuids ?? []);
  }
  const current = containers.find((container) => readLabels(container.labels)?.specHash === state.hash);
  if (!current && !context.stored()) {
    if (containers.length === 0 && !state.record.failure) {
      state.report({
        phase: Phase.ACCEPTED,
        reason: "desired-state-not-stored",
        message: "this server cannot write to its disk, so nothing is started on it",
      });
    }
    return settled;
  }
  for (const container of containers) {
    if (container === current) continue;
    state.report({ phase: Phase.STOPPING, reason: "replaced", message: "" });
    const graceSeconds = state.desired.container?.stopGraceSeconds ?? 0;
    if (container.state === "running") await client.stop(container.id, graceSeconds > 0 ? graceSeconds : 10);
    await client.remove(container.id);
  }
  if (state.record.failure && !current) {
    state.report({ phase: Phase.FAILED, ...state.record.failure });
    return settled;
  }
  let spec: ContainerSpec;
  try {
    spec = checkPolicy(state.desired, {
      volumeRoot: context.volumes.root,
      network: context.network,
      allowedRegistries: context.allowedRegistries,
    });
  } catch (error) {
    if (!isPlatformError(error)) throw error;
    if (current) await client.remove(current.id);
    return fail(state, context, error.code, error.message);
  }
  if (!current) return startNew(state, context, facts, spec, signal);
  const inspected = await client.inspect(current.id);
  if (!inspected) return again(0);
  return handleExisting(state, context, facts, spec, inspected);
}

const unixMs = (time: string | null | undefined): number => {
  const value = Date.parse(time ?? "");
  // The engine says year 1 for "never".
  return Number.isFinite(value) && value > 0 ? value : 0;
};

function publishedPorts(container: InspectedContainer) {
  return Object.entries(container.NetworkSettings?.Ports ?? {}).flatMap(([key, bindings]) => {
    const [port = "", protocol = "tcp"] = key.split("/");
    const hostPort = Number(bindings?.[0]?.HostPort ?? 0);
    return hostPort > 0 ? [{ containerPort: Number(port), hostPort, protocol }] : [];
  });
}

async function handleExisting(
  state: WorkloadState,
  context: WorkloadContext,
  facts: EngineFacts,
  spec: ContainerSpec,
  container: InspectedContainer,
): Promise<Next> {
  const startedAtUnixMs = unixMs(container.State.StartedAt);
  switch (container.State.Status) {
    case "running":
    case "paused":
    case "restarting": {
      state.attempts = 0;
      if (!state.record.started) state.remember({ started: true });
      const paused = container.State.Status === "paused";
      state.report({
        phase: Phase.RUNNING,
        reason: paused ? "paused" : "",
        message: paused ? "somebody paused the container on its host" : "",
        containerId: container.Id,
        startedAtUnixMs,
        exitCode: undefined,
        oomKilled: false,
        outputTail: undefined,
        ports: publishedPorts(container),
        restartCount: state.record.restartCount,
      });
      return settled;
    }
    case "removing":
      return again(500);
    case "dead":
      await context.client.remove(container.Id);
      return again(500);
    default:
      // "created" and "exited"; a start that failed leaves either, without ever having started.
      if (state.record.failure) {
        state.report({ phase: Phase.FAILED, ...state.record.failure, containerId: container.Id });
        return settled;
      }
      if (startedAtUnixMs === 0) {
        return startContainer(state, context, facts, container.Id, "first");
      }
      return handleExit(state, context, facts, spec, container, startedAtUnixMs);
  }
}

/** What the container's init says by its exit status, as a shell does. */
const exitHints = new Map([
  [126, " (the program is not executable)"],
  [127, " (the program is not in the image)"],
  [137, " (killed)"],
]);

async function handleExit(
  state: WorkloadState,
  context: WorkloadContext,
  facts: EngineFacts,
  spec: ContainerSpec,
  container: InspectedContainer,
  startedAtUnixMs: number,
): Promise<Next> {
  const exitCode = container.State.ExitCode ?? 0;
  const oomKilled = container.State.OOMKilled === true;
  const finishedAt = container.State.FinishedAt ?? "";
  const finishedAtUnixMs = unixMs(finishedAt);
  const reason = oomKilled ? "oom-killed" : exitCode === 0 ? "completed" : "exited";
  const message = oomKilled
    ? "the container used more memory than it has and was killed"
    : `the container exited with ${exitCode}${exitHints.get(exitCode) ?? ""}${container.State.Error ? `: ${container.State.Error}` : ""}`.slice(
        0,
        500,
      );
  if (state.record.reportedExit !== finishedAt) {
    const well = finishedAtUnixMs - startedAtUnixMs > wellAfterMs;
    context.emit(oomKilled ? "container.oom-killed" : "container.exited", state.allocationId, message, {
      exit_code: exitCode,
      oom_killed: oomKilled,
      container_id: container.Id,
      finished_at_unix_ms: finishedAtUnixMs,
    });
    state.remember({
      started: true,
      reportedExit: finishedAt,
      quickExits: well ? 0 : state.record.quickExits + 1,
    });
  }
  const common = {
    reason,
    message,
    containerId: container.Id,
    exitCode,
    oomKilled,
    startedAtUnixMs,
    ports: [],
    restartCount: state.record.restartCount,
  };
  if (!wantsRestart(state, spec, exitCode)) {
    const told = state.observed.phase === Phase.EXITED && state.observed.outputTail !== undefined;
    const outputTail = told ? state.observed.outputTail : await readOutputTail(context, container.Id);
    state.report({ ...common, phase: Phase.EXITED, outputTail });
    return settled;
  }
  if (state.restartDue?.exit !== finishedAt) {
    const { retryBaseMs } = context.timings;
    const waitMs = fullJitterMs(
      state.record.quickExits,
      { baseMs: retryBaseMs, capMs: retryBaseMs * 60 },
      context.random,
    );
    state.restartDue = { exit: finishedAt, atUnixMs: context.clock.now() + waitMs };
  }
  const waitMs = state.restartDue.atUnixMs - context.clock.now();
  if (waitMs > 0) {
    state.report({ ...common, phase: Phase.CREATING, reason: "restarting" });
    return again(waitMs);
  }
  return startContainer(state, context, facts, container.Id, "restart");
}

function wantsRestart(state: WorkloadState, spec: ContainerSpec, exitCode: number): boolean {
  // 0: as often as it takes.
  if (spec.maxRestarts > 0 && state.record.restartCount >= spec.maxRestarts) return false;
  return (
    spec.restartPolicy === ContainerSpec_RestartPolicy.ALWAYS ||
    (spec.restartPolicy === ContainerSpec_RestartPolicy.ON_FAILURE && exitCode !== 0)
  );
}

async function startContainer(
  state: WorkloadState,
  context: WorkloadContext,
  facts: EngineFacts,
  containerId: string,
  kind: "first" | "restart",
): Promise<Next> {
  if (kind === "first" && context.draining()) {
    state.report({
      phase: Phase.ACCEPTED,
      reason: "draining",
      message: "this server is being drained",
    });
    return settled;
  }
  // After a reboot the driver may need a while to make its nodes: a restart waits for them like a first start.
  const gpus = await presentGpus(state, context, facts);
  if (!("gpus" in gpus)) return gpus;
  state.report({ phase: Phase.CREATING, containerId });
  state.remember({ started: true });
  await context.records.flush();
  try {
    await context.client.start(containerId);
  } catch (error) {
    if (!isRefused(error)) throw error;
    state.attempts += 1;
    context.log.warn({ allocationId: state.allocationId, reason: errorMessage(error) }, "start refused");
    if (state.attempts >= (kind === "first" ? maxStartAttempts : maxRestartAttempts)) {
      return fail(state, context, "container-start-failed", errorMessage(error));
    }
    return backOff(state, context);
  }
  if (kind === "restart") state.remember({ restartCount: state.record.restartCount + 1 });
  context.emit("container.started", state.allocationId, "the container was started", {
    container_id: containerId,
    restart_count: state.record.restartCount,
    gpu_uuids: state.desired.gpuUuids,
  });
  return again(0);
}

const isCharacterDevice = async (path: string): Promise<boolean> => {
  try {
    return (await stat(path)).isCharacterDevice();
  } catch {
    return false;
  }
};

/** The workload's GPUs when all are there (with their nodes, where those are handed over); else what to do meanwhile. */
async function presentGpus(
  state: WorkloadState,
  context: WorkloadContext,
  facts: EngineFacts,
): Promise<{ readonly gpus: readonly GpuInventory[]; readonly controlNodes: readonly string[] } | Next> {
  const known = new Map(context.gpuMonitor.snapshot().gpus.map((gpu) => [gpu.uuid, gpu]));
  const gpus = state.desired.gpuUuids.flatMap((uuid) => known.get(uuid) ?? []);
  const missing = state.desired.gpuUuids.filter((uuid) => !known.has(uuid));
  const controlNodes: string[] = [];
  // The simulator's engine hands over nothing: its hosts have no nodes.
  if (facts.gpuMode === "device-nodes" && !facts.engine.simulated) {
    for (const gpu of gpus) {
      if (gpu.minorNumber === undefined || !(await isCharacterDevice(deviceNodeOf(gpu, context.deviceDir)))) {
        missing.push(gpu.uuid);
      }
    }
    for (const name of gpus.length > 0 ? controlNodeNames : []) {
      const path = `${context.deviceDir}/${name}`;
      if (await isCharacterDevice(path)) controlNodes.push(path);
    }
  }
  if (missing.length === 0) {
    state.missingSinceUnixMs = undefined;
    return { gpus, controlNodes };
  }
  const message = `not on this host now, or without a device node: ${missing.join(", ")}`;
  state.missingSinceUnixMs ??= context.clock.now();
  if (context.clock.now() - state.missingSinceUnixMs > gpuMissingMs) {
    return fail(state, context, "gpu-not-present", message);
  }
  state.report({ phase: Phase.ACCEPTED, reason: "gpu-not-present", message });
  return again(context.timings.verifyPollMs * 5);
}

async function startNew(
  state: WorkloadState,
  context: WorkloadContext,
  facts: EngineFacts,
  spec: ContainerSpec,
  signal: AbortSignal,
): Promise<Next> {
  const { client, log } = context;
  const { allocationId } = state;
  if (state.record.started) {
    // It ran, and somebody removed it on the host.
    if (!wantsRestart(state, spec, 1)) {
      return fail(state, context, "container-lost", "the container was removed on its host");
    }
  } else if (context.draining()) {
    state.report({
      phase: Phase.ACCEPTED,
      reason: "draining",
      message: "this server is being drained",
    });
    return settled;
  }
  const inTheWay = context.gate.acquire(allocationId, state.desired.gpuUuids);
  if (inTheWay !== undefined) {
    state.report({
      phase: Phase.ACCEPTED,
      reason: "waiting-for-gpu",
      message: "a GPU of this workload is not clean yet after its last one",
    });
    log.warn({ allocationId, inTheWay }, "waiting for a GPU that another workload holds");
    return settled;
  }
  state.remember({ gpuUuids: [...context.gate.heldBy(allocationId)] });
  const present = await presentGpus(state, context, facts);
  if (!("gpus" in present)) return present;

  const image = await provideImage(state, context, spec, signal);
  if ("kind" in image) return image;

  state.report({ phase: Phase.CREATING, reason: "", message: "" });
  const volumePaths = new Map<string, string>();
  for (const volume of spec.volumes) {
    volumePaths.set(volume.name, await context.volumes.ensure(allocationId, volume.name));
  }
  let containerId: string;
  try {
    const body = buildCreateRequest({
      workload: state.desired,
      spec,
      imageId: image.id,
      imageEnvironment: image.environment,
      handover: {
        mode: facts.gpuMode,
        gpus: present.gpus,
        cdi: facts.cdi,
        controlNodes: present.controlNodes,
        deviceDir: context.deviceDir,
      },
      volumePaths,
      network: context.network,
      publishAddress: context.publishAddress,
      ownerId: context.ownerId,
      incarnation: context.incarnation(),
      share: hostShare(
        facts.capacity,
        state.desired.gpuUuids.length,
        context.gpuMonitor.snapshot().gpus.length,
      ),
    });
    containerId = (await client.create(containerName(context.ownerId, allocationId), body)).id;
  } catch (error) {
    // 404: the image went away in between.
    if (!isRefused(error)) throw error;
    state.attempts += 1;
    log.warn({ allocationId, reason: errorMessage(error) }, "create refused");
    if (isRefused(error, 400) || state.attempts >= maxStartAttempts) {
      return fail(state, context, "container-create-failed", errorMessage(error));
    }
    return backOff(state, context);
  }
  return startContainer(state, context, facts, containerId, state.record.started ? "restart" : "first");
}

/** The image, pulled when the policy says so; else what to do meanwhile. */
async function provideImage(
  state: WorkloadState,
  context: WorkloadContext,
  spec: ContainerSpec,
  signal: AbortSignal,
): Promise<ImageFacts | Next> {
  const { client, clock } = context;
  const always = spec.pullPolicy === ContainerSpec_PullPolicy.ALWAYS;
  const { canonical } = parseImageReference(spec.image);
  const { tenantId } = state.desired;
  const present = await client.inspectImage(spec.image);
  const wasOpen = present !== undefined && context.images.isOpen(canonical, present.id);
  if (!always) {
    // What another tenant pulled with its credential is not there for this one.
    if (present && context.images.mayUse(tenantId, canonical, present.id)) return present;
    if (spec.pullPolicy === ContainerSpec_PullPolicy.NEVER) {
      return fail(
        state,
        context,
        "image-not-present",
        `image ${spec.image} is not on this host and may not be pulled`,
      );
    }
  }
  state.report({ phase: Phase.PULLING, reason: "", message: `pulling ${spec.image}` });
  let toldAtUnixMs = clock.now();
  if (spec.registry && !wasOpen) await context.images.beginPrivatePull(canonical);
  try {
    await client.pull(spec.image, spec.registry, {
      stallMs: context.timings.pullStallMs,
      totalMs: context.timings.pullTotalMs,
      signal,
      onProgress(fraction) {
        if (fraction === undefined || clock.now() - toldAtUnixMs < 2000) return;
        toldAtUnixMs = clock.now();
        state.report({ message: `pulling ${spec.image}: ${Math.floor(fraction * 100)} %` });
      },
    });
  } catch (error) {
    if (!isPlatformError(error) || error.code !== "image-pull-failed") {
      if (!isRefused(error)) throw error;
    }
    if (spec.registry && !(await client.inspectImage(spec.image))) {
      await context.images.endPrivatePull(canonical);
    }
    state.attempts += 1;
    if (state.attempts >= maxPullAttempts) {
      return fail(state, context, "image-pull-failed", errorMessage(error));
    }
    state.report({ message: `try ${state.attempts} of ${maxPullAttempts}: ${errorMessage(error)}` });
    return backOff(state, context);
  }
  state.attempts = 0;
  const pulled = await client.inspectImage(spec.image);
  if (!pulled) return backOff(state, context);
  const isPrivate = spec.registry !== undefined && !(wasOpen && present.id === pulled.id);
  await context.images.pulled(tenantId, canonical, pulled.id, isPrivate);
  return pulled;
}
