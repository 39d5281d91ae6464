import { createHash } from "node:crypto";
import { assertNever, PlatformError } from "@palebluedot/shared/errors.ts";
import {
  WorkloadDesired,
  WorkloadDesired_Target,
  type ContainerSpec,
  type GpuInventory,
} from "@palebluedot/shared/generated/palebluedot/agent/v1/agent.ts";
import type { GpuMode } from "../reconcile/options.ts";
import type { CdiSpecification } from "./detect.ts";
import type { HostShare } from "./host-share.ts";
import { droppedCapabilities, safeEnvironment } from "./policy.ts";

/** Labels by which a container is found again. The image cannot forge them: all of them are always set. */
export const labelNames = {
  allocation: "palebluedot.allocation",
  tenant: "palebluedot.tenant",
  specHash: "palebluedot.spec-hash",
  gpus: "palebluedot.gpus",
  incarnation: "palebluedot.incarnation",
  owner: "palebluedot.owner",
} as const;

export interface ContainerLabels {
  readonly allocationId: string;
  readonly specHash: string;
  readonly gpuUuids: readonly string[];
}

export function readLabels(
  labels: Readonly<Record<string, string>> | null | undefined,
): ContainerLabels | undefined {
  const allocationId = labels?.[labelNames.allocation];
  if (allocationId === undefined || allocationId === "") return undefined;
  return {
    allocationId,
    specHash: labels?.[labelNames.specHash] ?? "",
    gpuUuids: (labels?.[labelNames.gpus] ?? "").split(",").filter((uuid) => uuid !== ""),
  };
}

/**
 * Same hash, same container: a running one is kept. Over the wire encoding, which leaves out defaults, so
 * that a field added by a later version changes no hash. The registry password and the target do not count.
 */
export function specHash(workload: WorkloadDesired): string {
  const canonical = WorkloadDesired.encode({
    ...workload,
    target: WorkloadDesired_Target.RUNNING,
    container: workload.container && { ...workload.container, registry: undefined },
  }).finish();
  return createHash("sha256").update(canonical).digest("hex").slice(0, 32);
}

export const containerName = (ownerId: string, allocationId: string): string =>
  `palebluedot-${ownerId.slice(0, 8)}-${allocationId}`;

/** GPUs of a workload that are there now, and the device nodes that exist on the host. */
export interface GpuHandover {
  readonly mode: GpuMode;
  readonly gpus: readonly GpuInventory[];
  readonly cdi: CdiSpecification | undefined;
  /** Paths of the control nodes that exist: nvidiactl, nvidia-uvm, ... */
  readonly controlNodes: readonly string[];
  readonly deviceDir: string;
}

/** Control nodes a CUDA program opens beside its GPU's own. They give no access to a GPU by themselves. */
export const controlNodeNames = ["nvidiactl", "nvidia-uvm", "nvidia-uvm-tools", "nvidia-modeset"] as const;

/** The path of a GPU's node. Throws `gpu-minor-unknown`. */
export function deviceNodeOf(gpu: GpuInventory, deviceDir: string): string {
  if (gpu.minorNumber === undefined) {
    throw new PlatformError({
      code: "gpu-minor-unknown",
      kind: "unavailable",
      message: `nvidia-smi does not tell the device node of ${gpu.uuid}`,
      hint: "Use CDI or the NVIDIA runtime on this host.",
    });
  }
  return `${deviceDir}/nvidia${gpu.minorNumber}`;
}

function gpuSettings(handover: GpuHandover): {
  readonly DeviceRequests?: readonly unknown[];
  readonly Devices?: readonly unknown[];
} {
  if (handover.gpus.length === 0) return {};
  switch (handover.mode) {
    case "cdi":
      return {
        DeviceRequests: [
          {
            Driver: "cdi",
            DeviceIDs: handover.gpus.map((gpu) => {
              const name = handover.cdi?.deviceNames.has(gpu.uuid) === false ? String(gpu.index) : gpu.uuid;
              return `nvidia.com/gpu=${name}`;
            }),
          },
        ],
      };
    case "nvidia-runtime":
      return {
        DeviceRequests: [
          {
            Driver: "",
            Capabilities: [["gpu"]],
            DeviceIDs: handover.gpus.map((gpu) => gpu.uuid),
          },
        ],
      };
    case "device-nodes": {
      const nodes = [
        ...handover.gpus.map((gpu) => deviceNodeOf(gpu, handover.deviceDir)),
        ...handover.controlNodes,
      ];
      return {
        Devices: nodes.map((path) => ({
          PathOnHost: path,
          PathInContainer: `/dev/${path.slice(path.lastIndexOf("/") + 1)}`,
          CgroupPermissions: "rw",
        })),
      };
    }
    default:
      return assertNever(handover.mode, "GPU hand-over mode");
  }
}

/** Programs with many threads fit; a fork bomb does not take the host down. */
const defaultPids = 4096;
/** Beyond this one container could take all process ids that a host has. */
const maxPids = 65_536;

/** Body of the engine's "create container". Pure: the policy was checked and volumes were made before. */
export function buildCreateRequest(options: {
  readonly workload: WorkloadDesired;
  readonly spec: ContainerSpec;
  readonly imageId: string;
  readonly imageEnvironment: readonly string[];
  readonly handover: GpuHandover;
  readonly volumePaths: ReadonlyMap<string, string>;
  readonly network: string;
  readonly publishAddress: string;
  readonly ownerId: string;
  readonly incarnation: string;
  /** Limits where the tenant asked for none. */
  readonly share: HostShare | undefined;
}): Record<string, unknown> {
  const { spec, workload, handover } = options;
  const ports = spec.ports.map((port) => ({ ...port, key: `${port.containerPort}/${port.protocol}` }));
  const memory = spec.memoryBytes > 0 ? spec.memoryBytes : (options.share?.memoryBytes ?? 0);
  const millicores = spec.cpuMillicores > 0 ? spec.cpuMillicores : (options.share?.cpuMillicores ?? 0);
  const added = spec.addedCapabilities.map((name) => name.toUpperCase().replace(/^CAP_/, ""));
  return {
    // The id, not the name: what was inspected is what runs, though the tag may have moved meanwhile.
    Image: options.imageId,
    ...(spec.command.length > 0 ? { Entrypoint: spec.command } : {}),
    ...(spec.args.length > 0 ? { Cmd: spec.args } : {}),
    Env: safeEnvironment({
      image: options.imageEnvironment,
      tenant: spec.environment,
      visibleGpuUuids: handover.mode === "nvidia-runtime" ? handover.gpus.map((gpu) => gpu.uuid) : undefined,
    }),
    ...(spec.workingDirectory === "" ? {} : { WorkingDir: spec.workingDirectory }),
    ...(spec.user === "" ? {} : { User: spec.user }),
    Tty: false,
    OpenStdin: false,
    ExposedPorts: Object.fromEntries(ports.map((port) => [port.key, {}])),
    Labels: {
      [labelNames.allocation]: workload.allocationId,
      [labelNames.tenant]: workload.tenantId,
      [labelNames.specHash]: specHash(workload),
      [labelNames.gpus]: workload.gpuUuids.join(","),
      [labelNames.incarnation]: options.incarnation,
      [labelNames.owner]: options.ownerId,
    },
    HostConfig: {
      NetworkMode: options.network,
      Privileged: false,
      IpcMode: "private",
      PidMode: "",
      UTSMode: "",
      Init: true,
      // The agent restarts: it counts, backs off and knows whether the GPUs are there.
      RestartPolicy: { Name: "no", MaximumRetryCount: 0 },
      CapAdd: added,
      CapDrop: droppedCapabilities.filter((name) => !added.includes(name)),
      SecurityOpt: ["no-new-privileges:true"],
      PidsLimit: spec.pids > 0 ? Math.min(spec.pids, maxPids) : defaultPids,
      ...(millicores > 0 ? { NanoCpus: millicores * 1_000_000 } : {}),
      // Equal to memory: no swap.
      ...(memory > 0 ? { Memory: memory, MemorySwap: memory } : {}),
      ...(spec.shmBytes > 0 ? { ShmSize: spec.shmBytes } : {}),
      // Tenants go before the host's own services when the host runs out of memory.
      OomScoreAdj: 200,
      Ulimits: spec.ulimits.map((ulimit) => ({ Name: ulimit.name, Soft: ulimit.soft, Hard: ulimit.hard })),
      LogConfig: { Type: "json-file", Config: { "max-size": "16m", "max-file": "4" } },
      Mounts: spec.volumes.map((volume) => ({
        Type: "bind",
        Source: options.volumePaths.get(volume.name) ?? "",
        Target: volume.mountPath,
        ReadOnly: volume.readOnly,
        BindOptions: { Propagation: "rprivate" },
      })),
      PortBindings: Object.fromEntries(
        ports.map((port) => [
          port.key,
          [{ HostIp: options.publishAddress, HostPort: port.hostPort > 0 ? String(port.hostPort) : "" }],
        ]),
      ),
      ...gpuSettings(handover),
    },
  };
}
