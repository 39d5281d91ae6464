/** Which GPUs of the simulated server a container is given, from any of the ways to ask for them. */
import { basename } from "node:path";
import { models } from "../nvidia-smi/models.ts";
import type { GpuIdentity, ServerDescription } from "../nvidia-smi/state.ts";
import type { ContainerRecord, CreateBody } from "./container-config.ts";
import { addGpuProcess, removeGpuProcess } from "../server.ts";
import { EngineError } from "./http.ts";
import { programOf } from "./shell.ts";

function byId(server: ServerDescription, id: string): GpuIdentity | undefined {
  return server.gpus.find((gpu) => gpu.uuid === id || String(gpu.index) === id);
}

/** Throws as the engine does when a request cannot be met. */
export function gpusOf(server: ServerDescription | undefined, body: CreateBody): readonly number[] {
  const found = new Set<number>();
  const host = body.HostConfig;
  for (const request of host?.DeviceRequests ?? []) {
    const ids = request.DeviceIDs ?? [];
    if (request.Driver === "cdi") {
      for (const id of ids) {
        const name = id.replace(/^nvidia\.com\/gpu=/, "");
        const gpus =
          name === "all" ? (server?.gpus ?? []) : [server === undefined ? undefined : byId(server, name)];
        for (const gpu of gpus) {
          if (gpu === undefined || !id.startsWith("nvidia.com/gpu=")) {
            throw new EngineError(
              500,
              `could not select device driver "cdi": CDI device injection failed: unresolvable CDI devices ${id}`,
            );
          }
          found.add(gpu.index);
        }
      }
    } else if (request.Capabilities?.some((set) => set.includes("gpu"))) {
      if (server === undefined)
        throw new EngineError(500, 'could not select device driver "" with capabilities: [[gpu]]');
      const chosen =
        ids.length > 0
          ? ids.map((id) => byId(server, id))
          : request.Count === -1
            ? server.gpus
            : server.gpus.slice(0, request.Count ?? 0);
      for (const gpu of chosen) {
        if (gpu === undefined)
          throw new EngineError(
            500,
            `nvidia-container-cli: device error: ${ids.join(",")}: unknown device: unknown`,
          );
        found.add(gpu.index);
      }
    } else {
      throw new EngineError(
        500,
        `could not select device driver "${request.Driver ?? ""}" with capabilities: ${JSON.stringify(request.Capabilities ?? [])}`,
      );
    }
  }
  for (const device of host?.Devices ?? []) {
    const minor = /^nvidia(\d+)$/.exec(basename(device.PathOnHost))?.[1];
    if (minor === undefined) continue;
    const gpu = server?.gpus.find((candidate) => candidate.minorNumber === Number(minor));
    if (!gpu)
      throw new EngineError(
        500,
        `error gathering device information while adding custom device "${device.PathOnHost}": no such file or directory`,
      );
    found.add(gpu.index);
  }
  if (found.size === 0 && server !== undefined) {
    for (const id of (body.Labels?.["palebluedot.gpus"] ?? "").split(",")) {
      const gpu = byId(server, id.trim());
      if (gpu) found.add(gpu.index);
    }
  }
  return [...found].sort((a, b) => a - b);
}

/** The environment of a container as a map; the last of equal names counts. */
export function environmentOf(record: ContainerRecord): Readonly<Record<string, string>> {
  return Object.fromEntries(
    record.env.map((entry) => {
      const equals = entry.indexOf("=");
      return equals < 0 ? [entry, ""] : [entry.slice(0, equals), entry.slice(equals + 1)];
    }),
  );
}

function within(text: string | undefined, most: number): number | undefined {
  const value = Number(text);
  return text === undefined || Number.isNaN(value) ? undefined : Math.min(most, Math.max(0, value));
}

/**
 * Puts a container's process on its GPUs. What it does decides load and memory, unless its environment says
 * SIM_GPU_UTILIZATION (percent), SIM_GPU_MEMORY_MIB or SIM_GPU_STUCK=1 (it stays when the container has ended).
 */
export function occupyGpus(
  stateDir: string,
  server: ServerDescription | undefined,
  record: ContainerRecord,
  pid: number,
): void {
  if (server === undefined) return;
  const total = models[server.model].memoryTotalMib;
  const env = environmentOf(record);
  const program = programOf(record.command);
  const [utilization, share] =
    program.kind === "burn" ? [96, 0.8] : program.kind === "ticker" ? [70, 0.35] : [4, 0.01];
  for (const gpu of record.gpus) {
    addGpuProcess(stateDir, gpu, {
      pid,
      name: record.command[0] ?? "container",
      memoryMib: Math.round(within(env["SIM_GPU_MEMORY_MIB"], total * 0.95) ?? total * share),
      utilization: within(env["SIM_GPU_UTILIZATION"], 100) ?? utilization,
      stuck: env["SIM_GPU_STUCK"] === "1",
    });
  }
}

/** Takes a container's ended process off its GPUs. */
export function leaveGpus(stateDir: string, record: ContainerRecord, pid: number): void {
  if (environmentOf(record)["SIM_GPU_STUCK"] === "1") return;
  for (const gpu of record.gpus) {
    try {
      removeGpuProcess(stateDir, gpu, pid);
    } catch {
      // nvidia-smi drops the process by itself when its pid is gone.
    }
  }
}
