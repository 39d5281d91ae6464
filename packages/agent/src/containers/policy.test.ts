import { WorkloadDesired } from "@palebluedot/shared/generated/palebluedot/agent/v1/agent.ts";
import { isPlatformError } from "@palebluedot/shared/errors.ts";
import { describe, expect, test } from "vitest";
import { checkPolicy, safeEnvironment } from "./policy.ts";

type Spec = NonNullable<Parameters<typeof WorkloadDesired.fromPartial>[0]["container"]>;

const volumeRoot = "/var/lib/agent/volumes";
function verdict(container: Spec, network = "bridge", allocationId = "alloc-1"): string {
  const workload = WorkloadDesired.fromPartial({ allocationId, container: { image: "a/b:1", ...container } });
  try {
    checkPolicy(workload, { volumeRoot, network, allowedRegistries: ["127.0.0.1:5000"] });
    return "allowed";
  } catch (error) {
    if (!isPlatformError(error)) throw error;
    expect(error.hint).not.toBe("");
    return error.code;
  }
}

describe("container policy", () => {
  test.each<[string, Spec, string]>([
    ["a plain container", {}, "allowed"],
    ["privileged", { privileged: true }, "refused-privileged"],
    ["host network", { hostNetwork: true }, "refused-host-network"],
    ["host processes", { hostPid: true }, "refused-host-pid"],
    ["host IPC", { hostIpc: true }, "refused-host-ipc"],
    ["a GPU it was not given", { hostDevices: ["/dev/nvidia3"] }, "refused-device"],
    ["SYS_ADMIN", { addedCapabilities: ["SYS_ADMIN"] }, "refused-capability"],
    ["cap_net_admin in small letters", { addedCapabilities: ["cap_net_admin"] }, "refused-capability"],
    ["ALL", { addedCapabilities: ["ALL"] }, "refused-capability"],
    ["NET_RAW", { addedCapabilities: ["NET_RAW"] }, "refused-capability"],
    ["MKNOD", { addedCapabilities: ["CAP_MKNOD"] }, "refused-capability"],
    ["IPC_LOCK for RDMA", { addedCapabilities: ["CAP_IPC_LOCK", "SYS_PTRACE"] }, "allowed"],
    ["the root directory", { volumes: [{ name: "v", mountPath: "/v", hostPath: "/" }] }, "refused-host-path"],
    [
      "the engine's socket",
      { volumes: [{ name: "v", mountPath: "/v", hostPath: "/var/run/docker.sock" }] },
      "refused-host-path",
    ],
    [
      "another allocation's volume",
      { volumes: [{ name: "v", mountPath: "/v", hostPath: `${volumeRoot}/alloc-2/v` }] },
      "refused-host-path",
    ],
    [
      "the way up",
      { volumes: [{ name: "v", mountPath: "/v", hostPath: `${volumeRoot}/alloc-1/v/../../alloc-2/v` }] },
      "refused-host-path",
    ],
    [
      "below its volume, where it can make links",
      { volumes: [{ name: "v", mountPath: "/v", hostPath: `${volumeRoot}/alloc-1/v/link` }] },
      "refused-host-path",
    ],
    [
      "its own volume by path",
      { volumes: [{ name: "v", mountPath: "/v", hostPath: `${volumeRoot}/alloc-1/v` }] },
      "allowed",
    ],
    ["a managed volume", { volumes: [{ name: "v", mountPath: "/v" }] }, "allowed"],
    ["a volume named upwards", { volumes: [{ name: "..", mountPath: "/v" }] }, "refused-volume-name"],
    ["a volume named by a path", { volumes: [{ name: "a/b", mountPath: "/v" }] }, "refused-volume-name"],
    ["a mount over /proc", { volumes: [{ name: "v", mountPath: "/proc/sys" }] }, "refused-mount-path"],
    ["a mount over / by dots", { volumes: [{ name: "v", mountPath: "/x/.." }] }, "refused-mount-path"],
    [
      "a mount that asks the NVIDIA runtime for all",
      { volumes: [{ name: "v", mountPath: "/var/run/nvidia-container-devices/all" }] },
      "refused-mount-path",
    ],
    [
      "the same in a roundabout way",
      { volumes: [{ name: "v", mountPath: "/var/x/../run/./nvidia-container-devices/all" }] },
      "refused-mount-path",
    ],
    ["a relative mount", { volumes: [{ name: "v", mountPath: "v" }] }, "refused-mount-path"],
    [
      "one path twice",
      {
        volumes: [
          { name: "v", mountPath: "/v" },
          { name: "w", mountPath: "/v/" },
        ],
      },
      "refused-mount-path",
    ],
    ["a port of root", { ports: [{ containerPort: 80, hostPort: 80, protocol: "tcp" }] }, "refused-ports"],
    ["any free port", { ports: [{ containerPort: 80, hostPort: 0, protocol: "tcp" }] }, "allowed"],
    ["port 0", { ports: [{ containerPort: 0, hostPort: 0, protocol: "tcp" }] }, "refused-ports"],
    [
      "a protocol by injection",
      { ports: [{ containerPort: 80, hostPort: 0, protocol: "tcp/../x" }] },
      "refused-ports",
    ],
    ["unlimited open files", { ulimits: [{ name: "nofile", soft: -1, hard: -1 }] }, "refused-ulimit"],
    ["real-time priority", { ulimits: [{ name: "rtprio", soft: 99, hard: 99 }] }, "refused-ulimit"],
    ["soft above hard", { ulimits: [{ name: "stack", soft: 2, hard: 1 }] }, "refused-ulimit"],
    ["unlimited locked memory", { ulimits: [{ name: "memlock", soft: -1, hard: -1 }] }, "allowed"],
    ["a variable name with =", { environment: [{ name: "A=B", value: "" }] }, "refused-environment"],
    ["no image", { image: "" }, "refused-image-reference"],
    ["an image that is another path", { image: "a/../../containers/json" }, "refused-image-reference"],
    ["an image on the host itself", { image: "127.0.0.1:2375/x" }, "refused-registry"],
    ["an image from the link", { image: "169.254.169.254/latest/meta" }, "refused-registry"],
    ["an image that is a query", { image: "a?fromSrc=-" }, "refused-image-reference"],
  ])("%s", (_name, spec, expected) => {
    expect(verdict(spec)).toBe(expected);
  });

  test("ports need a network, names must be names", () => {
    expect(verdict({ ports: [{ containerPort: 80, hostPort: 0, protocol: "tcp" }] }, "none")).toBe(
      "refused-ports",
    );
    expect(verdict({}, "bridge", "../../etc")).toBe("refused-name");
    expect(() =>
      checkPolicy(WorkloadDesired.fromPartial({ allocationId: "a" }), {
        volumeRoot,
        network: "none",
        allowedRegistries: [],
      }),
    ).toThrow("names no container");
  });
});

describe("the container's environment", () => {
  const image = [
    "PATH=/bin",
    "NVIDIA_VISIBLE_DEVICES=all",
    "NVIDIA_DRIVER_CAPABILITIES=all",
    "NVIDIA_REQUIRE_CUDA=cuda>=12",
  ];
  const tenant = [
    { name: "NVIDIA_VISIBLE_DEVICES", value: "GPU-other" },
    { name: "NVIDIA_MIG_CONFIG_DEVICES", value: "all" },
    { name: "A", value: "1" },
  ];
  test("without GPUs, under CDI and with device nodes everything of NVIDIA's is void or gone", () => {
    expect(safeEnvironment({ image, tenant, visibleGpuUuids: undefined })).toEqual([
      "NVIDIA_DRIVER_CAPABILITIES",
      "NVIDIA_REQUIRE_CUDA",
      "A=1",
      "NVIDIA_VISIBLE_DEVICES=void",
    ]);
    expect(safeEnvironment({ image: [], tenant: [], visibleGpuUuids: [] })).toEqual([
      "NVIDIA_VISIBLE_DEVICES=void",
    ]);
  });
  test("under the NVIDIA runtime it names the GPUs that were given", () => {
    expect(safeEnvironment({ image, tenant, visibleGpuUuids: ["GPU-1", "GPU-2"] })).toEqual([
      "NVIDIA_REQUIRE_CUDA",
      "A=1",
      "NVIDIA_VISIBLE_DEVICES=GPU-1,GPU-2",
      "NVIDIA_DRIVER_CAPABILITIES=compute,utility",
    ]);
  });
});
