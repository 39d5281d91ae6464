import { mkdtempSync, readFileSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { execa } from "execa";
import { afterEach, beforeEach, describe, expect, test } from "vitest";
import { parseFault } from "./gpu-command.ts";

const main = new URL("main.ts", import.meta.url).pathname;
let dir: string;
let state: string;

beforeEach(() => {
  dir = mkdtempSync(join(tmpdir(), "palebluedot-sim-"));
  state = join(dir, "server");
});
afterEach(() => rmSync(dir, { recursive: true, force: true }));

const run = (...args: string[]) => execa(process.execPath, [main, ...args], { reject: false });

describe("palebluedot-simulator", () => {
  test("makes a server and prints as JSON what points an agent at it", async () => {
    const created = await run(
      "server",
      "create",
      "--state",
      state,
      "--model",
      "l40s",
      "--count",
      "4",
      "--driver",
      "595",
      "--sysfs",
    );
    expect(created.exitCode).toBe(0);
    const printed = JSON.parse(created.stdout) as {
      identity: Record<string, unknown>;
      gpus: unknown[];
      env: Record<string, string>;
    };
    expect(printed.gpus).toHaveLength(4);
    expect(JSON.parse(readFileSync(printed.env["PALEBLUEDOT_IDENTITY_FILE"] ?? "", "utf8"))).toEqual(
      printed.identity,
    );
    expect(
      readFileSync(join(printed.env["PALEBLUEDOT_SYSFS_ROOT"] ?? "", "class/dmi/id/product_serial"), "utf8"),
    ).toBe(`${String(printed.identity["serial"])}\n`);
    // The tool finds its server without any environment.
    const list = await execa(printed.env["PALEBLUEDOT_NVIDIA_SMI"] ?? "", ["-L"], {
      env: {},
      extendEnv: false,
    });
    expect(list.stdout.match(/NVIDIA L40S/g)).toHaveLength(4);
    const again = await run("server", "create", "--state", state);
    expect([again.exitCode, again.stderr]).toEqual([1, expect.stringContaining("simulated-server-exists")]);
    expect(JSON.parse((await run("server", "show", "--state", state)).stdout)).toEqual(printed);
  });

  test("puts faults in force, shows and ends them", async () => {
    await run("server", "create", "--state", state, "--count", "2");
    const fault = await run(
      "gpu",
      "fault",
      "throttle",
      "--state",
      state,
      "--gpu",
      "1",
      "--for",
      "60",
      "--set",
      "reasons=hw_slowdown,sw_power_cap",
    );
    expect([fault.exitCode, fault.stderr]).toEqual([0, ""]);
    expect(JSON.parse((await run("gpu", "faults", "--state", state)).stdout)).toEqual([
      expect.objectContaining({ kind: "throttle", gpu: 1, reasons: ["hw_slowdown", "sw_power_cap"] }),
    ]);
    await run("gpu", "clear", "--state", state, "--kind", "throttle");
    expect(JSON.parse((await run("gpu", "faults", "--state", state)).stdout)).toEqual([]);
    expect((await run("gpu", "xid", "79", "--state", state, "--gpu", "0")).exitCode).toBe(0);
    expect(readFileSync(join(state, "kernel.log"), "utf8")).toContain("NVRM: Xid (PCI:0000:1b:00): 79,");
  });

  test.each([
    [["gpu", "fault", "meltdown"], 2, "meltdown"],
    [["gpu", "fault", "slow"], 1, "delay_ms"],
    [["gpu", "fault", "hang", "--gpu", "9"], 1, "simulated-gpu-not-found"],
    [["gpu", "xid", "0", "--gpu", "0"], 2, "whole number"],
    [["gpu", "process", "add", "--gpu", "0", "--pid", "1", "--utilization", "101"], 2, "whole number"],
  ])("%j is refused and changes nothing", async (args, code, text) => {
    await run("server", "create", "--state", state, "--count", "1");
    const before = readFileSync(join(state, "state.json"), "utf8");
    const refused = await run(...args, "--state", state);
    expect([refused.exitCode, refused.stderr]).toEqual([code, expect.stringContaining(text)]);
    expect(JSON.parse(readFileSync(join(state, "faults.json"), "utf8"))).toEqual({ faults: [] });
    expect(readFileSync(join(state, "state.json"), "utf8")).toBe(before);
    expect(readFileSync(join(state, "kernel.log"), "utf8")).toBe("");
  });

  test.each([
    { kind: "throttle", reasons: [] },
    { kind: "hang", surplus: 1 },
    { kind: "ecc", dram_corrected: -1 },
    { kind: "recovery-action", action: "Hope" },
    {},
    undefined,
  ])("the fault %j is invalid", (fault) => {
    expect(() => parseFault(fault)).toThrow(expect.objectContaining({ code: "simulated-fault-invalid" }));
  });
});
