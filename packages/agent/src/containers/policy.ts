import { dirname, normalize } from "node:path";
import { PlatformError } from "@palebluedot/shared/errors.ts";
import { isHostLocalRegistry, parseImageReference } from "@palebluedot/shared/image-reference.ts";
import type {
  ContainerSpec,
  WorkloadDesired,
} from "@palebluedot/shared/generated/palebluedot/agent/v1/agent.ts";
import { safeNamePattern } from "./volumes.ts";

/** What a tenant's container may ask of this host. */
export interface PolicyContext {
  /** Root of the managed volumes, without symbolic links. */
  readonly volumeRoot: string;
  readonly network: string;
  /** Registries ("host" or "host:port") that are allowed though they are on the host itself. */
  readonly allowedRegistries: readonly string[];
}

/**
 * Capabilities a container may have: those of the engine's defaults that it gets anyway (naming them changes
 * nothing), AUDIT_WRITE, which it does not get unasked, and those that RDMA registration (IPC_LOCK), NUMA pinning (SYS_NICE) and profilers (SYS_PTRACE, in the container's own
 * process namespace) need.
 */
const allowedCapabilities: ReadonlySet<string> = new Set([
  "AUDIT_WRITE",
  "CHOWN",
  "DAC_OVERRIDE",
  "FOWNER",
  "FSETID",
  "KILL",
  "NET_BIND_SERVICE",
  "SETFCAP",
  "SETGID",
  "SETPCAP",
  "SETUID",
  "SYS_CHROOT",
  "IPC_LOCK",
  "SYS_NICE",
  "SYS_PTRACE",
]);

/**
 * Of the engine's defaults, what tenants do not get. NET_RAW sends packets in the name of neighbours on the
 * same bridge, MKNOD makes device nodes, AUDIT_WRITE writes into the host's audit log.
 */
export const droppedCapabilities = ["AUDIT_WRITE", "MKNOD", "NET_RAW"] as const;

const allowedUlimits = new Set([
  "core",
  "data",
  "fsize",
  "locks",
  "memlock",
  "nofile",
  "nproc",
  "rss",
  "sigpending",
  "stack",
]);
const maxOpenFiles = 1_048_576;

/**
 * Mount points that would hide what the engine or the GPU runtime puts there. The last two are how a
 * container asks the NVIDIA runtime for GPUs by mounts instead of by environment.
 */
const reservedMountPoints = [
  "/proc",
  "/sys",
  "/dev",
  "/var/run/nvidia-container-devices",
  "/run/nvidia-container-devices",
];

function refuse(code: string, message: string, hint: string): never {
  throw new PlatformError({ code: `refused-${code}`, kind: "forbidden", message, hint });
}

const isWithin = (path: string, directory: string): boolean =>
  path === directory || path.startsWith(`${directory}/`);

function checkVolumes(spec: ContainerSpec, allocationId: string, volumeRoot: string): void {
  const seen = new Set<string>();
  for (const volume of spec.volumes) {
    if (!safeNamePattern.test(volume.name)) {
      refuse(
        "volume-name",
        `volume name ${JSON.stringify(volume.name.slice(0, 100))} is not allowed`,
        "Letters, digits, dot, dash, underscore.",
      );
    }
    const target = normalize(volume.mountPath).replace(/\/+$/, "");
    if (!volume.mountPath.startsWith("/") || target === "" || volume.mountPath.includes("\0")) {
      refuse(
        "mount-path",
        `volume ${volume.name}: mount path must be absolute and not /`,
        "Mount at a path such as /data.",
      );
    }
    // A mount above a reserved place hides it just as well.
    if (reservedMountPoints.some((place) => isWithin(target, place) || isWithin(place, target))) {
      // /dev/shm is the container's own; its size is a field of its own.
      refuse("mount-path", `volume ${volume.name}: ${target} is reserved`, "Mount at a path such as /data.");
    }
    if (seen.has(target)) refuse("mount-path", `${target} is mounted twice`, "One volume for one path.");
    seen.add(target);
    // Only a volume's own directory, as a whole: a component below it could be a tenant's symbolic link
    // that points anywhere by the time the engine resolves it.
    if (volume.hostPath !== "") {
      const own = `${volumeRoot}/${allocationId}`;
      if (
        volume.hostPath !== normalize(volume.hostPath) ||
        dirname(volume.hostPath) !== own ||
        volume.hostPath !== `${own}/${volume.name}`
      ) {
        refuse(
          "host-path",
          `host path ${JSON.stringify(volume.hostPath.slice(0, 200))} is outside the managed volumes`,
          "Leave host_path empty: the volume is then made for the allocation.",
        );
      }
    }
  }
}

function checkPorts(spec: ContainerSpec, network: string): void {
  if (spec.ports.length > 64) refuse("ports", "more than 64 published ports", "Publish fewer ports.");
  if (spec.ports.length > 0 && network === "none") {
    refuse(
      "ports",
      "this host runs containers without a network, so no port can be published",
      "Ask for a container without ports, or set PALEBLUEDOT_CONTAINER_NETWORK on the host.",
    );
  }
  const seen = new Set<string>();
  for (const port of spec.ports) {
    if (port.containerPort < 1 || port.containerPort > 65_535) {
      refuse("ports", `container port ${port.containerPort} does not exist`, "1 to 65535.");
    }
    if (port.hostPort !== 0 && (port.hostPort < 1024 || port.hostPort > 65_535)) {
      refuse("ports", `host port ${port.hostPort} is not allowed`, "0 (any free port) or 1024 to 65535.");
    }
    if (port.protocol !== "tcp" && port.protocol !== "udp") {
      refuse("ports", `protocol ${JSON.stringify(port.protocol.slice(0, 20))} is not allowed`, "tcp or udp.");
    }
    const key = `${port.containerPort}/${port.protocol}`;
    if (seen.has(key)) refuse("ports", `${key} is published twice`, "Publish each port once.");
    seen.add(key);
  }
}

function checkUlimits(spec: ContainerSpec): void {
  for (const ulimit of spec.ulimits) {
    if (!allowedUlimits.has(ulimit.name)) {
      refuse(
        "ulimit",
        `ulimit ${JSON.stringify(ulimit.name.slice(0, 40))} is not allowed`,
        `One of: ${[...allowedUlimits].join(", ")}.`,
      );
    }
    const unlimited = ulimit.hard === -1;
    if (
      ulimit.soft < -1 ||
      ulimit.hard < -1 ||
      (!unlimited && (ulimit.soft === -1 || ulimit.soft > ulimit.hard))
    ) {
      refuse(
        "ulimit",
        `ulimit ${ulimit.name}: soft is above hard`,
        "0 <= soft <= hard, or -1 for unlimited.",
      );
    }
    if (ulimit.name === "nofile" && (unlimited || ulimit.hard > maxOpenFiles)) {
      refuse("ulimit", `ulimit nofile is above ${maxOpenFiles}`, `At most ${maxOpenFiles}.`);
    }
  }
}

function checkRegistry(image: string, allowed: readonly string[]): void {
  const { registry } = parseImageReference(image);
  if (registry === undefined || allowed.includes(registry) || !isHostLocalRegistry(registry)) return;
  refuse(
    "registry",
    `registry ${JSON.stringify(registry.slice(0, 100))} is the host itself`,
    "Use a registry with an address of its own. The operator may allow this one: PALEBLUEDOT_REGISTRY_ALLOW.",
  );
}

/** Throws PlatformError `refused-*` for the first thing that is not allowed. Looks at nothing but its arguments. */
export function checkPolicy(workload: WorkloadDesired, context: PolicyContext): ContainerSpec {
  const spec = workload.container;
  if (!spec) return refuse("empty", "the workload names no container", "Give an image.");
  if (!safeNamePattern.test(workload.allocationId)) {
    refuse("name", "the allocation id is not allowed as a name", "Letters, digits, dot, dash, underscore.");
  }
  if (spec.privileged) {
    refuse("privileged", "privileged containers are not allowed", "Remove privileged.");
  }
  if (spec.hostNetwork) {
    refuse("host-network", "the host's network namespace is not allowed", "Publish ports instead.");
  }
  if (spec.hostPid) refuse("host-pid", "the host's process namespace is not allowed", "Remove host_pid.");
  if (spec.hostIpc) {
    refuse("host-ipc", "the host's IPC namespace is not allowed", "Use shm_bytes for more shared memory.");
  }
  if (spec.hostDevices.length > 0) {
    refuse(
      "device",
      `device ${JSON.stringify(spec.hostDevices[0]?.slice(0, 100))} was not given to this container`,
      "GPUs come with the allocation; other devices are not handed out.",
    );
  }
  for (const capability of spec.addedCapabilities) {
    if (!allowedCapabilities.has(capability.toUpperCase().replace(/^CAP_/, ""))) {
      refuse(
        "capability",
        `capability ${JSON.stringify(capability.slice(0, 40))} is not allowed`,
        "Allowed beyond the defaults: AUDIT_WRITE, IPC_LOCK, SYS_NICE, SYS_PTRACE.",
      );
    }
  }
  for (const variable of spec.environment) {
    if (!/^[A-Za-z_][A-Za-z0-9_.-]{0,255}$/.test(variable.name) || variable.value.includes("\0")) {
      refuse(
        "environment",
        `environment variable ${JSON.stringify(variable.name.slice(0, 60))} is not allowed`,
        "A name begins with a letter or underscore; no NUL in the value.",
      );
    }
  }
  checkRegistry(spec.image, context.allowedRegistries);
  checkUlimits(spec);
  checkPorts(spec, context.network);
  checkVolumes(spec, workload.allocationId, context.volumeRoot);
  return spec;
}

const isNvidia = (name: string): boolean => name.toUpperCase().startsWith("NVIDIA_");

/**
 * The container's environment with every NVIDIA_* variable under our control. An image that says
 * NVIDIA_VISIBLE_DEVICES=all would see every GPU under the NVIDIA runtime, also when it was given none and
 * when that runtime is merely the engine's default. A name without "=" removes the image's variable.
 */
export function safeEnvironment(options: {
  readonly image: readonly string[];
  readonly tenant: readonly { readonly name: string; readonly value: string }[];
  /** What NVIDIA_VISIBLE_DEVICES says: UUIDs under the NVIDIA runtime, else undefined. */
  readonly visibleGpuUuids: readonly string[] | undefined;
}): string[] {
  const set = new Map<string, string>();
  for (const { name, value } of options.tenant) if (!isNvidia(name)) set.set(name, value);
  const uuids = options.visibleGpuUuids ?? [];
  set.set("NVIDIA_VISIBLE_DEVICES", uuids.length > 0 ? uuids.join(",") : "void");
  if (uuids.length > 0) set.set("NVIDIA_DRIVER_CAPABILITIES", "compute,utility");
  const removed = new Set(
    options.image
      .map((line) => line.split("=", 1)[0] ?? "")
      .filter((name) => isNvidia(name) && !set.has(name)),
  );
  return [...removed, ...[...set].map(([name, value]) => `${name}=${value}`)];
}
