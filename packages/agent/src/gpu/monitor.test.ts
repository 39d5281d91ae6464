import { execFile } from "node:child_process";
import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { promisify } from "node:util";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import {
  Condition_Status,
  type Condition,
} from "@palebluedot/shared/generated/palebluedot/agent/v1/agent.ts";
import { createLogger } from "@palebluedot/shared/logger.ts";
import { createGpuMonitor, type GpuMonitorOptions, type GpuMonitorWithReadings } from "./monitor.ts";
import type { GpuEvent } from "./types.ts";

/**
 * The monitor against the simulated nvidia-smi, run as the real process that it is. The agent imports
 * nothing of the simulator: it is a command here, as on a host.
 */
const simulator = fileURLToPath(new URL("../../../simulator/src/main.ts", import.meta.url));
const run = promisify(execFile);
const log = createLogger({ name: "test", level: "silent" });

let dir: string;
let server: string;
let smi: string;
let kernelLog: string;
const monitors: GpuMonitorWithReadings[] = [];

async function sim(...args: readonly string[]): Promise<string> {
  const { stdout } = await run(process.execPath, [simulator, ...args], { timeout: 20_000 });
  return stdout;
}

async function make(model: string, count: number, driver = 580): Promise<void> {
  const options = ["--model", model, "--count", String(count), "--driver", String(driver)];
  await sim("server", "create", "--state", server, ...options);
}

function setFaults(...faults: readonly object[]): void {
  writeFileSync(join(server, "faults.json"), JSON.stringify({ faults }));
}

async function monitor(options: Partial<GpuMonitorOptions> = {}): Promise<GpuMonitorWithReadings> {
  const made = createGpuMonitor({
    nvidiaSmiPath: smi,
    intervalMs: 1000,
    slowIntervalMs: 600_000,
    documentDeadlineMs: 15_000,
    queryDeadlineMs: 15_000,
    silenceMs: 10_000,
    killGraceMs: 300,
    kernelLogPollMs: 50,
    backoff: { baseMs: 50, capMs: 200 },
    stateDir: join(dir, "state"),
    sysfsRoot: join(dir, "no-sysfs"),
    log,
    ...options,
  });
  monitors.push(made);
  await made.start();
  return made;
}

async function until(what: string, holds: () => boolean | Promise<boolean>, ms = 20_000): Promise<void> {
  const deadline = Date.now() + ms;
  while (!(await holds())) {
    if (Date.now() > deadline) throw new Error(`not within ${String(ms)} ms: ${what}`);
    await new Promise((resolve) => setTimeout(resolve, 20));
  }
}

function condition(of: GpuMonitorWithReadings, component: string): Condition | undefined {
  return of.snapshot().conditions.find((one) => one.component === component);
}

beforeEach(() => {
  dir = mkdtempSync(join(tmpdir(), "pbd-gpu-"));
  server = join(dir, "server");
  smi = join(server, "bin/nvidia-smi");
  kernelLog = join(server, "kernel.log");
});

afterEach(async () => {
  await Promise.all(monitors.splice(0).map((one) => one.stop()));
  rmSync(dir, { recursive: true, force: true });
});

describe("a healthy host", () => {
  it("tells inventory and samples of every GPU", async () => {
    await make("h100", 8);
    const watched = await monitor();
    const { gpus, conditions } = watched.snapshot();
    expect(gpus.map((gpu) => gpu.index)).toEqual([0, 1, 2, 3, 4, 5, 6, 7]);
    expect(gpus[0]).toMatchObject({
      model: "NVIDIA H100 80GB HBM3",
      memoryTotalBytes: 81559 * 1024 * 1024,
      migCapable: true,
      migEnabled: false,
    });
    expect(gpus[0]?.nvlinkPeers).toHaveLength(7);
    expect(gpus[7]?.numaNode).toBe(1);
    expect(conditions.every((one) => one.status === Condition_Status.OK)).toBe(true);
    await until("samples of all eight", () => watched.latestSamples().length === 8);
    const sample = watched.latestSamples().find((one) => one.gpuUuid === gpus[3]?.uuid);
    expect(sample?.powerLimitWatts).toBe(700);
    expect(sample?.utilizationRatio).toBe(0);
    // Hopper has no fan: not told, so not there.
    expect(sample?.fanSpeedRatio).toBeUndefined();
  });

  it.each([535, 570, 580, 595])("asks driver %i only for fields that it knows", async (driver) => {
    await make("l40s", 1, driver);
    const watched = await monitor();
    await until("a sample", () => watched.latestSamples().length === 1);
    const sample = watched.latestSamples()[0];
    expect(sample?.powerLimitWatts).toBe(350);
    expect(sample?.clockEventReasons).toBeDefined();
    expect(condition(watched, "nvidia-smi")?.status).toBe(Condition_Status.OK);
  });

  it("takes one batch per tick", async () => {
    await make("a100", 4);
    const watched = await monitor();
    const sizes: number[] = [];
    watched.onSamples((samples) => sizes.push(samples.length));
    await until("three ticks", () => sizes.length >= 3);
    expect(sizes).toEqual(sizes.map(() => 4));
  });
});

describe("holders", () => {
  it("names the process, then its residue, then nothing", async () => {
    await make("a100", 2);
    const watched = await monitor();
    const [first, second] = watched.snapshot().gpus.map((gpu) => gpu.uuid);
    if (first === undefined || second === undefined) throw new Error("no GPUs");
    expect(await watched.holders([first])).toEqual({ kind: "known", holders: [] });

    const worker = execFile("sleep", ["60"]);
    const options = ["--state", server, "--gpu", "0", "--pid", String(worker.pid), "--memory", "4000"];
    await sim("gpu", "process", "add", ...options);
    const busy = await watched.holders([first]);
    expect(busy).toMatchObject({ kind: "known", holders: [{ gpuUuid: first, pid: worker.pid }] });
    expect(await watched.holders([second])).toEqual({ kind: "known", holders: [] });
    worker.kill("SIGKILL");
    await until("an empty GPU", async () => {
      const found = await watched.holders([first]);
      return found.kind === "known" && found.holders.length === 0;
    });

    setFaults({ kind: "dirty", gpu: 0, memory_mib: 900 });
    expect(await watched.holders([first])).toMatchObject({ holders: [{ gpuUuid: first, pid: 0 }] });
  });

  it("does not call a GPU empty when nvidia-smi hangs", async () => {
    await make("t4", 1);
    const watched = await monitor({ queryDeadlineMs: 700 });
    const uuid = watched.snapshot().gpus[0]?.uuid ?? "";
    setFaults({ kind: "hang", only: ["query"] });
    expect(await watched.holders([uuid])).toMatchObject({ kind: "unknown" });
    expect(await watched.holders(["GPU-00000000-1111-2222-3333-444444444444"])).toMatchObject({
      kind: "unknown",
    });
  });

  it("answers for the others while one GPU is lost", async () => {
    await make("a100", 4);
    const watched = await monitor();
    const uuids = watched.snapshot().gpus.map((gpu) => gpu.uuid);
    setFaults({ kind: "lost", gpu: 1 });
    expect(await watched.holders([uuids[3] ?? ""])).toEqual({ kind: "known", holders: [] });
    expect(await watched.holders([uuids[1] ?? ""])).toMatchObject({ kind: "unknown" });
  });
});

describe("nvidia-smi in trouble", () => {
  it("reports a hang of both loops and recovers from it", async () => {
    await make("t4", 1);
    const watched = await monitor({ silenceMs: 500, documentDeadlineMs: 1500 });
    await until("a sample", () => watched.latestSamples().length === 1);
    setFaults({ kind: "hang", ignore_sigterm: true });
    await until("a condition", () => condition(watched, "nvidia-smi")?.reason === "unresponsive");
    expect(condition(watched, "nvidia-smi")?.status).toBe(Condition_Status.FAILED);
    expect(condition(watched, "gpu-driver")?.status).toBe(Condition_Status.UNKNOWN);
    expect((await watched.refresh()).gpus).toHaveLength(1);
    setFaults();
    await until("recovery", () => condition(watched, "nvidia-smi")?.status === Condition_Status.OK);
  });

  it("starts on a host where nvidia-smi hangs from the beginning", async () => {
    await make("t4", 1);
    setFaults({ kind: "hang" });
    const watched = await monitor({ documentDeadlineMs: 800, silenceMs: 800 });
    expect(condition(watched, "nvidia-smi")?.reason).toBe("unresponsive");
    expect(watched.snapshot().gpus).toEqual([]);
  });

  it("stops at once while its first look hangs", async () => {
    await make("t4", 1);
    setFaults({ kind: "hang", ignore_sigterm: true });
    const watched = createGpuMonitor({ nvidiaSmiPath: smi, killGraceMs: 300, kernelLogPath: kernelLog, log });
    const starting = watched.start();
    await until("the look has begun", () => condition(watched, "nvidia-smi")?.reason === "not-seen-yet");
    expect(condition(watched, "gpu-driver")?.status).toBe(Condition_Status.UNKNOWN);
    const stoppedAt = Date.now();
    await watched.stop();
    await starting;
    // Not after the look's own deadline of a minute.
    expect(Date.now() - stoppedAt).toBeLessThan(10_000);
  });

  it("still knows its GPUs when it is restarted while nvidia-smi hangs", async () => {
    await make("a100", 4);
    const first = await monitor();
    const before = first.snapshot().gpus;
    await first.stop();
    setFaults({ kind: "hang" });
    const watched = await monitor({ documentDeadlineMs: 500 });
    expect(watched.snapshot().gpus.map((gpu) => [gpu.uuid, gpu.index, gpu.minorNumber])).toEqual(
      before.map((gpu) => [gpu.uuid, gpu.index, gpu.minorNumber]),
    );
    expect(condition(watched, "gpu-2")?.status).toBe(Condition_Status.UNKNOWN);
    setFaults();
    await until("recovery", () => condition(watched, "gpu-2")?.status === Condition_Status.OK);
    await until("topology", () => watched.snapshot().gpus[0]?.nvlinkPeers.length === 3);
  });

  it("says that the driver is not loaded, and notices when it is", async () => {
    await make("t4", 1);
    setFaults({ kind: "driver-not-loaded" });
    const watched = await monitor();
    expect(condition(watched, "gpu-driver")).toMatchObject({
      status: Condition_Status.FAILED,
      reason: "driver-not-loaded",
    });
    setFaults();
    await until("the GPU", () => watched.snapshot().gpus.length === 1);
    expect(condition(watched, "gpu-driver")?.status).toBe(Condition_Status.OK);
  });

  it.each(["invalid-utf8", "control-characters", "long-line", "truncated", "endless"])(
    "passes no %s on",
    async (form) => {
      await make("t4", 1);
      setFaults({ kind: "garbage", form });
      const watched = await monitor({ documentDeadlineMs: 3000 });
      const text = JSON.stringify(watched.snapshot());
      expect(text).not.toMatch(/\\u00[01]|\\b|\u007f/);
      expect(text.length).toBeLessThan(20_000);
      setFaults();
      await watched.refresh();
      expect(watched.snapshot().gpus[0]?.model).toBe("Tesla T4");
    },
  );
});

describe("a lost GPU", () => {
  it.each(["lost", "unknown-error", "fields", "absent"])(
    "is told once, in the form %s, and the others go on",
    async (form) => {
      await make("a100", 4);
      const watched = await monitor();
      const events: GpuEvent[] = [];
      watched.onEvent((event) => events.push(event));
      const uuids = watched.snapshot().gpus.map((gpu) => gpu.uuid);
      setFaults({ kind: "lost", gpu: 1, form });
      await watched.refresh();
      await until("the event", () => events.some((event) => event.type === "gpu.lost"));
      expect(condition(watched, "gpu-1")).toMatchObject({
        status: Condition_Status.FAILED,
        reason: "gpu-lost",
      });
      for (const other of ["gpu-0", "gpu-2", "gpu-3"]) {
        expect(condition(watched, other)?.status, other).toBe(Condition_Status.OK);
      }
      const since = Date.now();
      await until("samples of the others", () =>
        [0, 2, 3].every((index) =>
          watched
            .latestSamples()
            .some((sample) => sample.gpuUuid === uuids[index] && sample.timeUnixMs > since),
        ),
      );
      expect(watched.latestSamples().some((sample) => sample.gpuUuid === uuids[1])).toBe(false);
      expect(events.filter((event) => event.type === "gpu.lost").map((event) => event.gpuUuid)).toEqual([
        uuids[1],
      ]);
      // It stays in the inventory, with its index.
      expect(watched.snapshot().gpus.map((gpu) => gpu.index)).toEqual([0, 1, 2, 3]);
      setFaults();
      await watched.refresh();
      expect(condition(watched, "gpu-1")?.status).toBe(Condition_Status.OK);
    },
  );
});

describe("findings of the slow loop", () => {
  it.each([
    [{ kind: "recovery-action", gpu: 0, action: "Reset" }, "recovery-reset", Condition_Status.FAILED],
    [{ kind: "remapped-rows", gpu: 0, pending: true }, "row-remap-pending", Condition_Status.DEGRADED],
    [{ kind: "remapped-rows", gpu: 0, failure: true }, "row-remap-failure", Condition_Status.FAILED],
    [{ kind: "ecc", gpu: 0, dram_uncorrected: 2 }, "ecc-uncorrected", Condition_Status.DEGRADED],
  ])("%j", async (fault, reason, status) => {
    await make("h100", 2);
    const watched = await monitor();
    setFaults(fault);
    await watched.refresh();
    expect(condition(watched, "gpu-0")).toMatchObject({ reason, status });
    expect(condition(watched, "gpu-1")?.status).toBe(Condition_Status.OK);
  });
});

describe("the kernel log", () => {
  it("tells an Xid with GPU, process and action, and condemns the GPU until the driver clears it", async () => {
    await make("h100", 2);
    const watched = await monitor({ kernelLogPath: kernelLog });
    const events: GpuEvent[] = [];
    watched.onEvent((event) => events.push(event));
    await until("the log", () => condition(watched, "kernel-log")?.status === Condition_Status.OK);
    const options = ["--state", server, "--gpu", "1", "--pid", "4711", "--process", "python3"];
    await sim("gpu", "xid", "95", ...options);
    await until("the event", () => events.length > 0);
    const gpu = watched.snapshot().gpus[1];
    expect(events[0]).toMatchObject({
      type: "gpu.xid",
      gpuUuid: gpu?.uuid,
      data: { xid: 95, pid: 4711, process: "python3", action: "RESET_GPU" },
    });
    expect(Math.abs((events[0]?.timeUnixMs ?? 0) - Date.now())).toBeLessThan(60_000);
    expect(watched.lastXids().get(gpu?.uuid ?? "")).toBe(95);
    expect(condition(watched, "gpu-1")?.reason).toBe("xid-95");
    await watched.refresh();
    expect(condition(watched, "gpu-1")?.status).toBe(Condition_Status.OK);
  });
});

describe("pause", () => {
  it("ends the child, nests, and goes on afterwards", async () => {
    await make("t4", 1);
    const watched = await monitor();
    await until("a sample", () => watched.latestSamples().length === 1);
    const resumeOuter = await watched.pause("mode change");
    const resumeInner = await watched.pause("reset");
    resumeInner();
    resumeInner();
    let seen = 0;
    watched.onSamples(() => (seen += 1));
    // Longer than an interval: a child that still ran would have told something.
    await new Promise((resolve) => setTimeout(resolve, 1500));
    expect(seen).toBe(0);
    resumeOuter();
    await until("samples again", () => seen > 0);
    expect(condition(watched, "nvidia-smi")?.status).toBe(Condition_Status.OK);
  });
});

describe("a host without GPUs", () => {
  it("is absent, not broken, when neither tool nor device is there", async () => {
    const sysfs = join(dir, "sysfs");
    await run("mkdir", ["-p", join(sysfs, "bus/pci/devices/0000:00:02.0")]);
    writeFileSync(join(sysfs, "bus/pci/devices/0000:00:02.0/vendor"), "0x8086\n");
    writeFileSync(join(sysfs, "bus/pci/devices/0000:00:02.0/class"), "0x030000\n");
    const watched = await monitor({ nvidiaSmiPath: join(dir, "absent"), sysfsRoot: sysfs });
    expect(condition(watched, "gpu-driver")).toMatchObject({
      status: Condition_Status.ABSENT,
      reason: "no-gpu",
    });
  });

  it("is broken when a GPU is on the bus and the tool is missing", async () => {
    const device = join(dir, "sysfs/bus/pci/devices/0000:18:00.0");
    await run("mkdir", ["-p", device]);
    writeFileSync(join(device, "vendor"), "0x10de\n");
    writeFileSync(join(device, "class"), "0x030200\n");
    const watched = await monitor({ nvidiaSmiPath: join(dir, "absent"), sysfsRoot: join(dir, "sysfs") });
    expect(condition(watched, "nvidia-smi")).toMatchObject({
      status: Condition_Status.FAILED,
      reason: "nvidia-smi-missing",
    });
  });
});
