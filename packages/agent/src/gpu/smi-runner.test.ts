import { chmodSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { systemClock } from "@palebluedot/shared/clock.ts";
import { createLogger } from "@palebluedot/shared/logger.ts";
import { failureOf } from "./smi-failure.ts";
import { createSmiRunner, type SmiRunner, type SmiRunnerOptions } from "./smi-runner.ts";

const log = createLogger({ name: "test", level: "silent" });
let dir: string;
let runners: SmiRunner[];
/** Processes that a test left unkillable on purpose. */
let survivors: number[];

beforeEach(() => {
  dir = mkdtempSync(join(tmpdir(), "pbd-smi-"));
  runners = [];
  survivors = [];
});

afterEach(async () => {
  await Promise.all(runners.map((runner) => runner.stop()));
  for (const pid of survivors) {
    try {
      process.kill(-pid, "SIGKILL");
    } catch {
      // Gone.
    }
  }
  rmSync(dir, { recursive: true, force: true });
});

/** A program in the place of nvidia-smi. */
function runnerOf(script: string, options: Partial<SmiRunnerOptions> = {}): SmiRunner {
  const path = join(dir, "nvidia-smi");
  writeFileSync(path, `#!/bin/sh\n${script}\n`);
  chmodSync(path, 0o755);
  const runner = createSmiRunner({
    path,
    env: { PATH: process.env["PATH"], ...options.env },
    clock: systemClock,
    log,
    killGraceMs: 100,
    ...options,
  });
  runners.push(runner);
  return runner;
}

function alive(pid: number): boolean {
  try {
    process.kill(pid, 0);
    return true;
  } catch {
    return false;
  }
}

async function until(holds: () => boolean): Promise<void> {
  const deadline = Date.now() + 10_000;
  while (!holds()) {
    if (Date.now() > deadline) throw new Error("not within 10 s");
    await new Promise((resolve) => setTimeout(resolve, 10));
  }
}

describe("the watchdog", () => {
  it("passes output and exit code on", async () => {
    const runner = runnerOf('echo "args: $*"; echo "no devices" >&2; exit 6');
    expect(await runner.run("list", ["-L"], 5000)).toEqual({
      kind: "failed",
      exitCode: 6,
      stdout: "args: -L\n",
      stderr: "no devices\n",
    });
  });

  it("answers at the deadline, then kills a child that ignores SIGTERM, and what it started", async () => {
    const runner = runnerOf(`trap '' TERM; sleep 600 & echo "$!" > ${dir}/grandchild; wait; sleep 600`);
    const begun = Date.now();
    expect(await runner.run("document", ["-q", "-x"], 300)).toEqual({ kind: "timeout", afterMs: 300 });
    expect(Date.now() - begun).toBeLessThan(2000);
    const grandchild = Number(readFileSync(join(dir, "grandchild"), "utf8"));
    await until(() => !alive(grandchild));
    expect(runner.abandoned().size).toBe(0);
  });

  it("abandons a child that SIGKILL does not end, and starts no second one of its kind", async () => {
    // Nobody can order uninterruptible sleep; a signal that is not sent looks the same from here.
    const runner = runnerOf(`echo $$ >> ${dir}/started; exec sleep 600`, { kill: () => undefined });
    expect(await runner.run("document", [], 200)).toMatchObject({ kind: "timeout" });
    await until(() => runner.abandoned().has("document"));
    const pid = runner.abandoned().get("document") ?? 0;
    survivors.push(pid);
    expect(alive(pid)).toBe(true);
    const again = await runner.run("document", [], 200);
    expect(again).toEqual({ kind: "stuck", pid });
    expect(failureOf(again)?.reason).toBe("unresponsive");
    expect(readFileSync(join(dir, "started"), "utf8").trim().split("\n")).toHaveLength(1);

    // Another kind is not held up by it ...
    const other = runner.run("list", [], 200);
    expect(await other).toMatchObject({ kind: "timeout" });
    await until(() => runner.abandoned().has("list"));
    survivors.push(runner.abandoned().get("list") ?? 0);

    // ... and once the kernel lets it go, its own kind works again.
    process.kill(-pid, "SIGKILL");
    await until(() => !runner.abandoned().has("document"));
    expect(await runner.run("document", [], 200)).toMatchObject({ kind: "timeout" });
    await until(() => runner.abandoned().has("document"));
    survivors.push(runner.abandoned().get("document") ?? 0);
  });

  it("ends a child whose output never ends", async () => {
    const runner = runnerOf("exec cat /dev/zero");
    const result = await runner.run("document", [], 30_000);
    expect(result.kind).toBe("failed");
    if (result.kind === "failed") expect(result.stdout.length).toBeLessThanOrEqual(16 * 1024 * 1024);
  });

  it("runs one of a kind at a time", async () => {
    const runner = runnerOf(
      `[ -e ${dir}/busy ] && echo overlap; touch ${dir}/busy; sleep 0.1; rm ${dir}/busy`,
    );
    const results = await Promise.all([1, 2, 3].map(() => runner.run("apps", [], 5000)));
    expect(results.map((result) => (result.kind === "ok" ? result.stdout : result.kind))).toEqual([
      "",
      "",
      "",
    ]);
  });

  it("says that the program is missing", async () => {
    const runner = runnerOf("true", { path: join(dir, "absent") });
    const result = await runner.run("list", [], 1000);
    expect(failureOf(result)?.reason).toBe("nvidia-smi-missing");
  });

  it("hands no secret of its own environment over", async () => {
    const env = { PATH: process.env["PATH"], SOME_TOKEN: "t0p", DB_PASSWORD: "t0p", PLAIN: "yes" };
    const result = await runnerOf("env", { env }).run("list", [], 5000);
    expect(result).toMatchObject({ kind: "ok", stdout: expect.stringContaining("PLAIN=yes") as string });
    expect(result.kind === "ok" && result.stdout).not.toContain("t0p");
  });
});

describe("failureOf", () => {
  it.each([
    [
      9,
      "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.",
      "driver-not-loaded",
      "gpu-driver",
    ],
    [6, "No devices were found", "no-devices", "gpu-driver"],
    [
      18,
      "Failed to initialize NVML: Driver/library version mismatch",
      "driver-library-mismatch",
      "gpu-driver",
    ],
    [15, "", "gpu-lost", "gpu-driver"],
    [
      255,
      "Unable to determine the device handle for GPU0000:18:00.0: Unknown Error",
      "gpu-lost",
      "gpu-driver",
    ],
    [4, "Insufficient Permissions", "permission-denied", "nvidia-smi"],
    [139, "", "died", "nvidia-smi"],
  ])("exit code %i, %j: %s", (exitCode, stdout, reason, component) => {
    expect(failureOf({ kind: "failed", exitCode, stdout, stderr: "" })).toMatchObject({ reason, component });
  });
});
