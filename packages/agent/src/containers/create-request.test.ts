import { mkdtemp, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import {
  type ContainerSpec,
  GpuInventory,
  WorkloadDesired,
  WorkloadDesired_Target,
} from "@palebluedot/shared/generated/palebluedot/agent/v1/agent.ts";
import { describe, expect, test } from "vitest";
import { buildCreateRequest, readLabels, specHash, type GpuHandover } from "./create-request.ts";
import type { HostShare } from "./host-share.ts";
import { describeEngine, detectGpuMode, readCdiSpecification } from "./detect.ts";

const gpus = [0, 1].map((index) =>
  GpuInventory.fromPartial({ uuid: `GPU-${index}`, index, minorNumber: 7 - index }),
);
const workload = WorkloadDesired.fromPartial({
  allocationId: "alloc-1",
  tenantId: "tenant-1",
  target: WorkloadDesired_Target.RUNNING,
  gpuUuids: gpus.map((gpu) => gpu.uuid),
  container: {
    image: "a/b",
    environment: [{ name: "NVIDIA_VISIBLE_DEVICES", value: "all", secret: false }],
    volumes: [{ name: "data", mountPath: "/data", readOnly: true }],
    ports: [{ containerPort: 80, hostPort: 0, protocol: "tcp" }],
    addedCapabilities: ["cap_ipc_lock"],
  },
});

function request(handover: Partial<GpuHandover>, share?: HostShare, limits: Partial<ContainerSpec> = {}) {
  if (!workload.container) throw new Error("no container");
  const spec = { ...workload.container, ...limits };
  return buildCreateRequest({
    workload,
    spec,
    imageId: "sha256:1",
    imageEnvironment: ["NVIDIA_VISIBLE_DEVICES=all"],
    handover: { mode: "cdi", gpus, cdi: undefined, controlNodes: [], deviceDir: "/dev", ...handover },
    volumePaths: new Map([["data", "/managed/alloc-1/data"]]),
    network: "bridge",
    publishAddress: "10.0.0.1",
    ownerId: "owner",
    incarnation: "inc",
    share,
  }) as { Env: string[]; HostConfig: Record<string, unknown>; Labels: Record<string, string> };
}

// No engine of this repository's tests has a GPU: CDI and the NVIDIA runtime are held to the request they
// send, and are not executed.
describe("request to create a container", () => {
  test("CDI (not executed here): devices by name, environment void", () => {
    const byUuid = request({ cdi: { deviceNames: new Set(["all", "GPU-0", "GPU-1"]) } });
    expect(byUuid.HostConfig["DeviceRequests"]).toEqual([
      { Driver: "cdi", DeviceIDs: ["nvidia.com/gpu=GPU-0", "nvidia.com/gpu=GPU-1"] },
    ]);
    expect(byUuid.HostConfig["Devices"]).toBeUndefined();
    expect(byUuid.Env).toEqual(["NVIDIA_VISIBLE_DEVICES=void"]);
    const byIndex = request({ cdi: { deviceNames: new Set(["all", "0", "1"]) } });
    expect(byIndex.HostConfig["DeviceRequests"]).toEqual([
      { Driver: "cdi", DeviceIDs: ["nvidia.com/gpu=0", "nvidia.com/gpu=1"] },
    ]);
  });

  test("NVIDIA runtime (not executed here): devices and environment by UUID", () => {
    const { HostConfig, Env } = request({ mode: "nvidia-runtime" });
    expect(HostConfig["DeviceRequests"]).toEqual([
      { Driver: "", Capabilities: [["gpu"]], DeviceIDs: ["GPU-0", "GPU-1"] },
    ]);
    expect(Env).toEqual(["NVIDIA_VISIBLE_DEVICES=GPU-0,GPU-1", "NVIDIA_DRIVER_CAPABILITIES=compute,utility"]);
  });

  test("device nodes by minor number, which is not the index", () => {
    const { HostConfig, Env } = request({
      mode: "device-nodes",
      deviceDir: "/d",
      controlNodes: ["/d/nvidiactl"],
    });
    expect(HostConfig["Devices"]).toEqual([
      { PathOnHost: "/d/nvidia7", PathInContainer: "/dev/nvidia7", CgroupPermissions: "rw" },
      { PathOnHost: "/d/nvidia6", PathInContainer: "/dev/nvidia6", CgroupPermissions: "rw" },
      { PathOnHost: "/d/nvidiactl", PathInContainer: "/dev/nvidiactl", CgroupPermissions: "rw" },
    ]);
    expect(Env).toEqual(["NVIDIA_VISIBLE_DEVICES=void"]);
  });

  test.each(["cdi", "nvidia-runtime", "device-nodes"] as const)(
    "without GPUs nothing is handed over: %s",
    (mode) => {
      const { HostConfig, Env } = request({ mode, gpus: [], controlNodes: ["/dev/nvidiactl"] });
      expect(HostConfig["DeviceRequests"]).toBeUndefined();
      expect(HostConfig["Devices"]).toBeUndefined();
      expect(Env).toEqual(["NVIDIA_VISIBLE_DEVICES=void"]);
    },
  );

  test("isolation, mounts, ports and labels", () => {
    const { HostConfig, Labels } = request({});
    expect(HostConfig).toMatchObject({
      Privileged: false,
      IpcMode: "private",
      PidsLimit: 4096,
      CapAdd: ["IPC_LOCK"],
      CapDrop: ["AUDIT_WRITE", "MKNOD", "NET_RAW"],
      RestartPolicy: { Name: "no" },
      Mounts: [{ Type: "bind", Source: "/managed/alloc-1/data", Target: "/data", ReadOnly: true }],
      PortBindings: { "80/tcp": [{ HostIp: "10.0.0.1", HostPort: "" }] },
    });
    expect(HostConfig["Memory"]).toBeUndefined();
    expect(readLabels(Labels)).toEqual({
      allocationId: "alloc-1",
      specHash: specHash(workload),
      gpuUuids: ["GPU-0", "GPU-1"],
    });
  });

  test("limits: what was asked for, else the share of the host; never more processes than the ceiling", () => {
    const share = { memoryBytes: 8e9, cpuMillicores: 4000 };
    expect(request({}, share).HostConfig).toMatchObject({
      Memory: 8e9,
      MemorySwap: 8e9,
      NanoCpus: 4_000_000_000,
    });
    const asked = { memoryBytes: 1e9, cpuMillicores: 500, pids: 4_000_000 };
    expect(request({}, share, asked).HostConfig).toMatchObject({
      Memory: 1e9,
      NanoCpus: 500_000_000,
      PidsLimit: 65_536,
    });
  });

  test("the hash ignores target and registry password, and nothing else", () => {
    const container = workload.container;
    if (!container) throw new Error("no container");
    const hash = specHash(workload);
    expect(specHash({ ...workload, target: WorkloadDesired_Target.RECLAIMED })).toBe(hash);
    const registry = { server: "r", username: "u", password: "p" };
    expect(specHash({ ...workload, container: { ...container, registry } })).toBe(hash);
    expect(specHash({ ...workload, gpuUuids: ["GPU-1", "GPU-0"] })).not.toBe(hash);
    expect(specHash({ ...workload, container: { ...container, image: "a/c" } })).not.toBe(hash);
  });
});

const version = (api: string, extra: object = {}) => ({ Version: "28.2.2", ApiVersion: api, ...extra });

describe("detection of the hand-over mode", () => {
  const spec = { deviceNames: new Set(["GPU-0"]) };
  test.each([
    [
      "CDI with a specification",
      "1.50",
      { CDISpecDirs: ["/etc/cdi"], Runtimes: { nvidia: {} } },
      spec,
      "cdi",
    ],
    [
      "CDI without one",
      "1.50",
      { CDISpecDirs: ["/etc/cdi"], Runtimes: { runc: {} } },
      undefined,
      "device-nodes",
    ],
    [
      "a specification the engine discovered",
      "1.50",
      { CDISpecDirs: ["/x"], DiscoveredDevices: [{ Source: "cdi", ID: "nvidia.com/gpu=0" }] },
      undefined,
      "cdi",
    ],
    ["CDI switched off", "1.50", { CDISpecDirs: [], Runtimes: { nvidia: {} } }, spec, "nvidia-runtime"],
    ["an old engine with a specification", "1.41", { CDISpecDirs: ["/etc/cdi"] }, spec, "device-nodes"],
    [
      "an old engine with the runtime",
      "1.41",
      { Runtimes: { runc: {}, nvidia: {} } },
      undefined,
      "nvidia-runtime",
    ],
  ] as const)("%s", (_name, api, info, cdi, expected) => {
    expect(
      detectGpuMode(
        version(api),
        {
          ...info,
          CDISpecDirs: "CDISpecDirs" in info ? [...info.CDISpecDirs] : null,
          DiscoveredDevices: "DiscoveredDevices" in info ? [...info.DiscoveredDevices] : null,
        },
        cdi,
      ),
    ).toBe(expected);
  });

  test("reads device names from a generated specification, and ignores other vendors'", async () => {
    const dir = await mkdtemp(join(tmpdir(), "pbd-cdi-"));
    try {
      expect(await readCdiSpecification([dir, "/does/not/exist"])).toBeUndefined();
      await writeFile(join(dir, "amd.yaml"), 'kind: amd.com/gpu\ndevices:\n- name: "0"\n');
      expect(await readCdiSpecification([dir])).toBeUndefined();
      await writeFile(
        join(dir, "nvidia.yaml"),
        "---\ncdiVersion: 0.5.0\nkind: nvidia.com/gpu\ndevices:\n- name: GPU-0\n  containerEdits:\n    deviceNodes:\n    - path: /dev/nvidia0\n- name: all\n",
      );
      expect([...((await readCdiSpecification([dir]))?.deviceNames ?? [])]).toEqual(["GPU-0", "all"]);
    } finally {
      await rm(dir, { recursive: true, force: true });
    }
  });

  test("names the engine", () => {
    const podman = version("1.41", { Components: [{ Name: "Podman Engine" }] });
    expect(describeEngine(podman, "device-nodes")).toMatchObject({ name: "podman", simulated: false });
    const simulated = version("1.41", { Platform: { Name: "palebluedot-simulated-engine" } });
    expect(describeEngine(simulated, "cdi")).toMatchObject({
      name: "palebluedot-simulated-engine",
      simulated: true,
    });
  });
});
