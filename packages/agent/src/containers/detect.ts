import { readdir, readFile } from "node:fs/promises";
import { join } from "node:path";
import type { ContainerEngine } from "@palebluedot/shared/generated/palebluedot/agent/v1/agent.ts";
import type { GpuMode } from "../reconcile/options.ts";
import type { EngineInfo, EngineVersion } from "./engine.ts";

const simulatedEngineName = "palebluedot-simulated-engine";

/** A CDI specification of NVIDIA GPUs found on this host. */
export interface CdiSpecification {
  /** Device names after "nvidia.com/gpu=": UUIDs or indexes, as the generator was told. */
  readonly deviceNames: ReadonlySet<string>;
}

const cdiKind = "nvidia.com/gpu";

/**
 * Reads the device names from the specifications (JSON or the generator's YAML) in these directories.
 * Undefined when none is for NVIDIA GPUs. The host's view is read, so it fails safe when the engine is remote.
 */
export async function readCdiSpecification(
  directories: readonly string[],
): Promise<CdiSpecification | undefined> {
  const deviceNames = new Set<string>();
  let found = false;
  for (const directory of directories.slice(0, 8)) {
    const files = await readdir(directory).catch((): string[] => []);
    for (const file of files.filter((name) => /\.(?:json|ya?ml)$/.test(name)).slice(0, 64)) {
      const text = await readFile(join(directory, file), "utf8").catch(() => "");
      if (!new RegExp(`["']?kind["']?\\s*:\\s*["']?${cdiKind}["']?\\s*[,\\n}]`).test(text)) continue;
      found = true;
      for (const match of text.matchAll(/["']?\bname["']?\s*:\s*["']?([A-Za-z0-9:._-]+)["']?/g)) {
        if (match[1] !== undefined) deviceNames.add(match[1]);
      }
    }
  }
  return found ? { deviceNames } : undefined;
}

function apiAtLeast(version: string, major: number, minor: number): boolean {
  const [a = 0, b = 0] = version.split(".").map(Number);
  return a > major || (a === major && b >= minor);
}

/**
 * The best hand-over mode this engine supports: CDI (API 1.44 or newer, with a specification for NVIDIA
 * GPUs), else the NVIDIA runtime, else explicit device nodes, which every engine knows.
 */
export function detectGpuMode(
  version: EngineVersion,
  info: EngineInfo,
  cdi: CdiSpecification | undefined,
): GpuMode {
  const discovered = (info.DiscoveredDevices ?? []).some(
    (device) => device.Source === "cdi" && (device.ID ?? "").startsWith(`${cdiKind}=`),
  );
  if (apiAtLeast(version.ApiVersion, 1, 44) && (info.CDISpecDirs ?? []).length > 0 && (discovered || cdi)) {
    return "cdi";
  }
  if (info.Runtimes && "nvidia" in info.Runtimes) return "nvidia-runtime";
  return "device-nodes";
}

export function describeEngine(version: EngineVersion, gpuMode: GpuMode): ContainerEngine {
  const names = [version.Platform?.Name, ...(version.Components ?? []).map((part) => part.Name)].filter(
    (name) => typeof name === "string",
  );
  const simulated = [...names, version.Version].some((name) => name.includes(simulatedEngineName));
  const podman = names.some((name) => name.toLowerCase().includes("podman"));
  return {
    name: simulated ? simulatedEngineName : podman ? "podman" : "docker",
    version: version.Version,
    apiVersion: version.ApiVersion,
    gpuMode,
    simulated,
  };
}
