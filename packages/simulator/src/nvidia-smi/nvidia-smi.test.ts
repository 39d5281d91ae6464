import { readFileSync, rmSync, writeFileSync } from "node:fs";
import { execa, type ResultPromise } from "execa";
import { afterEach, beforeEach, describe, expect, test } from "vitest";
import {
  addGpuProcess,
  appendXid,
  clearFaults,
  listFaults,
  openSimulatedServer,
  removeGpuProcess,
  setFault,
  type Fault,
} from "../server.ts";
import { queryFields } from "./fields.ts";
import { driverGenerations, modelNames, models } from "./models.ts";
import { testServer, type TestServer } from "./testing.ts";

let server: TestServer;
beforeEach(() => {
  server = testServer({ speed: 50 });
});
afterEach(() => server[Symbol.dispose]());

const csv = "--format=csv,noheader,nounits";

async function numbers(field: string): Promise<number[]> {
  const { out } = await server.smi(`--query-gpu=${field}`, csv);
  return out.trim().split("\n").map(Number);
}

/** Polls until the condition holds; the last value tells why it never did. */
async function until<T>(look: () => Promise<T>, holds: (value: T) => boolean): Promise<T> {
  const deadline = Date.now() + 10_000;
  for (;;) {
    const value = await look();
    if (holds(value)) return value;
    if (Date.now() > deadline) throw new Error(`never held; last: ${JSON.stringify(value)}`);
    await new Promise((resolve) => setTimeout(resolve, 20));
  }
}

/** Collects the lines of a running command. */
function lines(child: Pick<ResultPromise, "stdout">): string[] {
  const collected: string[] = [];
  let rest = "";
  child.stdout?.setEncoding("utf8").on("data", (text: string) => {
    const parts = (rest + text).split("\n");
    rest = parts.pop() ?? "";
    collected.push(...parts);
  });
  return collected;
}

describe("query", () => {
  test.each(driverGenerations.flatMap((driver) => modelNames.map((model) => [driver.major, model] as const)))(
    "every field of driver %i is answered by %s, one cell each",
    async (driver, model) => {
      using other = testServer({ model, count: 1, driver });
      const generation = driverGenerations.find((candidate) => candidate.major === driver);
      const fields = queryFields(generation ?? { major: 0, version: "", cudaVersion: "", dtd: "" });
      const { code, out } = await other.smi(
        `--query-gpu=${fields.map((f) => f.name).join(",")}`,
        "--format=csv",
      );
      expect(code).toBe(0);
      const [header = "", row = "", ...more] = out.trimEnd().split("\n");
      expect(more).toEqual([]);
      expect(header.split(", ")).toEqual(fields.map((f) => (f.unit ? `${f.name} [${f.unit}]` : f.name)));
      expect(row.split(", ")).toHaveLength(fields.length);
      expect(row).toContain(models[model].name);
      expect(row).not.toMatch(/undefined|NaN|object/);
    },
  );

  test("aliases answer under the field's own name, units can be left out, GPUs be chosen", async () => {
    const uuid = server.gpus[1]?.uuid ?? "";
    const long = await server.smi(
      "--query-gpu=clocks.sm,gpu_uuid,clocks_throttle_reasons.active",
      "--format=csv",
      "-i",
      uuid,
    );
    expect(long.out).toBe(
      `clocks.current.sm [MHz], uuid, clocks_event_reasons.active\n345 MHz, ${uuid}, 0x0000000000000001\n`,
    );
    const short = await server.smi("--query-gpu=index,clocks.sm", csv, "-i", "00000000:43:00.0");
    expect(short.out).toBe("1, 345\n");
  });

  test.each([
    [["--query-gpu=index,bogus", "--format=csv"], 2, 'Field "bogus" is not a valid field to query.'],
    [["--query-gpu=index"], 2, "--format="],
    [["--query-gpu=index", "--format=json"], 2, ""],
    [["--no-such-option"], 2, "Invalid combination of input arguments"],
    [["--query-gpu=index", "--format=csv", "-i", "9"], 6, "No devices were found"],
    [["mig", "-lgi"], 6, "No MIG-enabled devices found."],
    [["mig", "-lci"], 6, "No MIG-enabled devices found."],
  ])("%j exits %i", async (args, code, message) => {
    const result = await server.smi(...args);
    expect(result.code).toBe(code);
    expect(result.out).toContain(message);
  });

  test("an older driver rejects a newer field and leaves out newer elements", async () => {
    using old = testServer({ driver: 535 });
    expect((await old.smi("--query-gpu=gpu_recovery_action", csv)).code).toBe(2);
    const xml = (await old.smi("-q", "-x")).out;
    expect(xml).not.toContain("gpu_recovery_action");
    expect(xml).toContain("<reset_required>No</reset_required>");
    expect((await server.smi("-q", "-x")).out).toContain("<gpu_recovery_action>None</gpu_recovery_action>");
  });

  test("the texts for people name every GPU", async () => {
    for (const args of [[], ["-q"], ["-L"]]) {
      const { code, out } = await server.smi(...args);
      expect(code).toBe(0);
      expect(out).toContain("NVIDIA H100 80GB HBM3");
    }
    expect((await server.smi("-L")).out).toContain(
      `GPU 1: NVIDIA H100 80GB HBM3 (UUID: ${server.gpus[1]?.uuid})`,
    );
    const topology = (await server.smi("topo", "-m")).out.split("\n");
    expect(topology[0]).toBe("\t\u001B[4mGPU0\tGPU1\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\u001B[0m");
    expect(topology[1]).toMatch(/^GPU0\t X \tNV18\t/);
    expect((await server.smi("--version")).out).toContain("DRIVER version      : 580.105.08");
  });
});

describe("identity", () => {
  test("follows from the seed alone", () => {
    using same = testServer();
    using other = testServer({ seed: 2 });
    expect(same.gpus).toEqual(server.gpus);
    expect(same.identity).toEqual(server.identity);
    expect(other.gpus.map((gpu) => gpu.uuid)).not.toEqual(server.gpus.map((gpu) => gpu.uuid));
    expect(other.identity.smbios_uuid).not.toBe(server.identity.smbios_uuid);
    expect(openSimulatedServer(server.stateDir)).toEqual(expect.objectContaining({ env: server.env }));
  });

  test("bad orders are refused and make nothing", () => {
    expect(() => testServer({ count: 9 })).toThrow(
      expect.objectContaining({ code: "simulated-server-invalid" }),
    );
    expect(() => testServer({ driver: 1 })).toThrow(
      expect.objectContaining({ code: "simulated-server-invalid" }),
    );
    expect(() => testServer({ dir: server.stateDir })).toThrow(
      expect.objectContaining({ code: "simulated-server-exists" }),
    );
  });
});

describe("load", () => {
  test("follows the processes, and everything returns to idle when they leave", async () => {
    const [idlePower = 0] = await numbers("power.draw");
    const [idleTemperature = 0] = await numbers("temperature.gpu");
    const child = execa("sleep", ["1000"], { reject: false });
    addGpuProcess(server.stateDir, 0, {
      pid: child.pid ?? 0,
      name: "python3",
      memoryMib: 40_000,
      utilization: 95,
    });
    await until(
      () => numbers("utilization.gpu"),
      ([busy = 0, other]) => busy > 85 && other === 0,
    );
    await until(
      () => numbers("power.draw"),
      ([power = 0]) => power > idlePower + 400,
    );
    await until(
      () => numbers("temperature.gpu"),
      ([temperature = 0]) => temperature > idleTemperature + 15,
    );
    expect(await numbers("memory.used")).toEqual([40_000, 0]);
    const apps = await server.smi("--query-compute-apps=gpu_uuid,pid,name,used_memory", "--format=csv");
    expect(apps.out).toBe(
      `gpu_uuid, pid, process_name, used_gpu_memory [MiB]\n${server.gpus[0]?.uuid}, ${child.pid}, python3, 40000 MiB\n`,
    );
    expect((await server.smi("-q", "-x")).out).toContain(`<pid>${child.pid}</pid>`);

    child.kill("SIGKILL");
    await child;
    await until(
      () => numbers("memory.used"),
      ([used]) => used === 0,
    );
    await until(
      () => numbers("utilization.gpu"),
      ([busy]) => busy === 0,
    );
    await until(
      () => numbers("power.draw"),
      ([power = 0]) => power < idlePower + 10,
    );
    expect((await server.smi("--query-compute-apps=pid", csv)).out).toBe("");
  });

  test("a stuck process stays until it is taken off", async () => {
    const child = execa("sleep", ["1000"], { reject: false });
    const pid = child.pid ?? 0;
    addGpuProcess(server.stateDir, 1, { pid, name: "stuck", memoryMib: 100, utilization: 0, stuck: true });
    child.kill("SIGKILL");
    await child;
    expect((await server.smi("--query-compute-apps=pid", csv)).out).toBe(`${pid}\n`);
    removeGpuProcess(server.stateDir, 1, pid);
    expect((await server.smi("--query-compute-apps=pid", csv)).out).toBe("");
  });

  test("two processes that write at once lose nothing", async () => {
    const pids = Array.from({ length: 12 }, (_, index) => 100_000 + index);
    const main = new URL("../main.ts", import.meta.url).pathname;
    await Promise.all(
      pids.map((pid) =>
        execa(process.execPath, [
          main,
          "gpu",
          "process",
          "add",
          "--state",
          server.stateDir,
          "--gpu",
          "0",
          "--pid",
          String(pid),
          "--memory",
          "10",
          "--stuck",
        ]),
      ),
    );
    const { out } = await server.smi("--query-compute-apps=pid", csv);
    expect(
      out
        .trim()
        .split("\n")
        .map(Number)
        .sort((a, b) => a - b),
    ).toEqual(pids);
  }, 30_000);
});

describe("streaming", () => {
  test("-lms prints its header once and sees changes while it runs", async () => {
    const child = execa(
      server.nvidiaSmiPath,
      ["--query-gpu=index,utilization.gpu", "--format=csv", "-lms", "50"],
      { reject: false },
    );
    const seen = lines(child);
    await until(
      async () => seen.length,
      (count) => count > 6,
    );
    addGpuProcess(server.stateDir, 1, { pid: process.pid, name: "node", memoryMib: 10, utilization: 100 });
    await until(
      async () => seen.at(-1) ?? "",
      (line) => /^1, (9\d|100) %$/.test(line),
    );
    expect(seen.filter((line) => line.startsWith("index"))).toHaveLength(1);
    // A driver that goes away ends the stream as it ends the real tool.
    setFault(server.stateDir, { kind: "driver-not-loaded" });
    expect((await child).exitCode).toBe(9);
  });

  test("ends quietly when its reader goes away", async () => {
    const child = execa(server.nvidiaSmiPath, ["--query-gpu=index", csv, "-lms", "20"], {
      reject: false,
      buffer: { stdout: false },
    });
    const seen = lines(child);
    await until(
      async () => seen.length,
      (count) => count > 0,
    );
    child.stdout.destroy();
    expect((await child).stderr).toBe("");
  });
});

describe("faults", () => {
  test.each<[Fault, string[], number, string]>([
    [{ kind: "driver-not-loaded" }, ["-L"], 9, "couldn't communicate with the NVIDIA driver"],
    [{ kind: "nvml-missing" }, ["-L"], 12, "couldn't find libnvidia-ml.so"],
    [{ kind: "version-mismatch" }, ["-L"], 18, "Driver/library version mismatch"],
    [{ kind: "no-permission" }, ["-L"], 4, "Insufficient Permissions"],
    [
      { kind: "lost", gpu: 1 },
      ["-q", "-x"],
      15,
      "Unable to determine the device handle for GPU 0000:43:00.0: GPU is lost.",
    ],
    [
      { kind: "lost", gpu: 1, form: "unknown-error" },
      ["-L"],
      255,
      "Unable to determine the device handle for GPU0000:43:00.0: Unknown Error",
    ],
    [
      { kind: "lost", gpu: 1, form: "fields" },
      ["--query-gpu=index,temperature.gpu", csv],
      0,
      "1, [GPU is lost]",
    ],
    [{ kind: "lost", gpu: 1, form: "fields" }, ["-q", "-x"], 0, "<gpu_temp>GPU is lost</gpu_temp>"],
    [
      { kind: "reset-required", gpu: 0 },
      ["--query-gpu=memory.used,gpu_recovery_action", csv],
      0,
      "[GPU requires reset], Reset",
    ],
    [
      { kind: "recovery-action", gpu: 0, action: "Drain and Reset" },
      ["--query-gpu=gpu_recovery_action", csv],
      0,
      "Drain and Reset\nNone",
    ],
    [
      { kind: "ecc", gpu: 0, dram_uncorrected: 3 },
      ["--query-gpu=ecc.errors.uncorrected.volatile.total", csv],
      0,
      "3\n0",
    ],
    [
      { kind: "remapped-rows", gpu: 0, pending: true },
      ["--query-gpu=remapped_rows.pending", csv],
      0,
      "Yes\nNo",
    ],
    [
      { kind: "overheat", gpu: 0, temperature_celsius: 95 },
      ["--query-gpu=temperature.gpu", csv, "-i", "0"],
      0,
      "95\n",
    ],
    [{ kind: "dirty", gpu: 0, memory_mib: 700 }, ["--query-gpu=memory.used", csv], 0, "700\n0"],
    [
      { kind: "throttle", gpu: 0, reasons: ["hw_slowdown", "hw_thermal_slowdown"] },
      ["--query-gpu=clocks_event_reasons.active,clocks_event_reasons.hw_slowdown", csv, "-i", "0"],
      0,
      "0x0000000000000049, Active",
    ],
    [{ kind: "exit", code: 77, message: "simulated" }, ["-L"], 77, "simulated"],
  ])("%j", async (fault, args, code, text) => {
    setFault(server.stateDir, fault);
    const broken = await server.smi(...args);
    expect(broken.out).toContain(text);
    expect(broken.code).toBe(code);
    clearFaults(server.stateDir);
    const mended = await server.smi(...args);
    expect(mended.code).toBe(0);
    expect(mended.out).not.toContain(text);
  });

  test("a GPU that is absent is not enumerated, and the others keep their index", async () => {
    setFault(server.stateDir, { kind: "lost", gpu: 0, form: "absent" });
    expect((await server.smi("--query-gpu=index,count", csv)).out).toBe("1, 1\n");
  });

  test("faults are replaced by kind and GPU, cleared by either, and end by themselves", async () => {
    setFault(server.stateDir, { kind: "dirty", gpu: 0, memory_mib: 1 });
    setFault(server.stateDir, { kind: "dirty", gpu: server.gpus[0]?.uuid, memory_mib: 2 });
    setFault(server.stateDir, { kind: "dirty", gpu: 1, memory_mib: 3 });
    setFault(server.stateDir, { kind: "slow", delay_ms: 1, until_ms: Date.now() - 1 });
    expect(listFaults(server.stateDir)).toEqual([
      { kind: "dirty", gpu: 0, memory_mib: 2 },
      { kind: "dirty", gpu: 1, memory_mib: 3 },
    ]);
    clearFaults(server.stateDir, { gpu: 0 });
    expect(listFaults(server.stateDir)).toEqual([{ kind: "dirty", gpu: 1, memory_mib: 3 }]);
    expect(() => setFault(server.stateDir, { kind: "dirty", gpu: 7, memory_mib: 3 })).toThrow(
      expect.objectContaining({ code: "simulated-gpu-not-found" }),
    );
  });

  test("a faults file that is broken is no fault", async () => {
    writeFileSync(`${server.stateDir}/faults.json`, "{ not json");
    expect((await server.smi("-L")).code).toBe(0);
  });

  test("hanging for ever: SIGTERM may be ignored, SIGKILL ends it, and the stream hangs too", async () => {
    const stream = execa(server.nvidiaSmiPath, ["--query-gpu=index", csv, "-lms", "30"], { reject: false });
    const seen = lines(stream);
    await until(
      async () => seen.length,
      (count) => count > 2,
    );
    setFault(server.stateDir, { kind: "hang", ignore_sigterm: true });
    const once = execa(server.nvidiaSmiPath, ["-L"], { reject: false });
    // It hangs when it has stopped printing for many intervals.
    let last = -1;
    await until(
      async () => {
        await new Promise((resolve) => setTimeout(resolve, 400));
        const quiet = seen.length === last;
        last = seen.length;
        return quiet;
      },
      (quiet) => quiet,
    );
    stream.kill("SIGTERM");
    once.kill("SIGTERM");
    const ended = await Promise.race([
      once.then(() => "ended"),
      stream.then(() => "ended"),
      new Promise((resolve) => setTimeout(resolve, 300, "hangs")),
    ]);
    expect(ended).toBe("hangs");
    stream.kill("SIGKILL");
    once.kill("SIGKILL");
    expect((await once).signal).toBe("SIGKILL");
    expect((await once).stdout).toBe("");
    await stream;
  });

  test("a hung process goes when its server is removed", async () => {
    setFault(server.stateDir, { kind: "hang", ignore_sigterm: true });
    const child = execa(server.nvidiaSmiPath, ["-L"], { reject: false });
    // The launcher has become the tool.
    await until(
      async () => readFileSync(`/proc/${child.pid}/cmdline`, "utf8"),
      (command) => command.includes("nvidia-smi/main.ts"),
    );
    rmSync(server.stateDir, { recursive: true });
    expect((await child).exitCode).not.toBe(0);
  });

  test("garbage is not what a parser expects", async () => {
    const clean = (await server.smi("-q", "-x")).out;
    setFault(server.stateDir, { kind: "garbage", form: "truncated" });
    expect((await server.smi("-q", "-x")).out.length).toBeLessThan(clean.length * 0.7);
    setFault(server.stateDir, { kind: "garbage", form: "invalid-utf8" });
    const raw = await execa(server.nvidiaSmiPath, ["-q", "-x"], { encoding: "buffer" });
    expect(() => new TextDecoder("utf8", { fatal: true }).decode(raw.stdout)).toThrow(TypeError);
    setFault(server.stateDir, { kind: "garbage", form: "control-characters" });
    expect((await server.smi("-q", "-x")).out).toContain("\u0000");
  });

  test("Xid lines look like the kernel's, in both forms, with growing sequence numbers", () => {
    appendXid(server.stateDir, { gpu: 1, xid: 79 });
    appendXid(server.stateDir, { gpu: 1, xid: 31, pid: 4711, processName: "python3" });
    appendXid(server.stateDir, { gpu: 0, xid: 48, form: "dmesg", message: "two\nlines" });
    const log = readFileSync(server.kernelLogPath, "utf8").trimEnd().split("\n");
    expect(log).toHaveLength(3);
    expect(log[0]).toMatch(
      /^4,1000,\d+,-;NVRM: Xid \(PCI:0000:43:00\): 79, pid='<unknown>', name=<unknown>, GPU has fallen off the bus\.$/,
    );
    expect(log[1]).toMatch(/^4,1001,\d+,-;NVRM: Xid \(PCI:0000:43:00\): 31, pid=4711, name=python3, /);
    expect(log[2]).toMatch(
      /^\[\w{3} \w{3} [ \d]\d \d\d:\d\d:\d\d \d{4}\] NVRM: Xid \(PCI:0000:1b:00\): 48, .*two lines$/,
    );
  });
});
