import { spawn, type ChildProcess } from "node:child_process";
import { chmodSync, mkdtempSync, readFileSync, rmSync, statSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { afterAll, afterEach, describe, expect, test } from "vitest";
import { z } from "zod";
import { readMigrations } from "./db/migrate.ts";

/** The controller as its users run it: a process with an embedded PostgreSQL. */

const main = fileURLToPath(new URL("main.ts", import.meta.url));
const dir = mkdtempSync(join(tmpdir(), "pbd-main-"));
// The embedded server runs as another user when this one is root.
chmodSync(dir, 0o711);
const dataDir = join(dir, "data");
const running = new Set<ChildProcess>();

const addressesSchema = z.object({
  pid: z.number(),
  url: z.string(),
  enrolment_port: z.number(),
  agent_port: z.number(),
  ca_fingerprint: z.string(),
  admin_token_file: z.string(),
});

const environment = {
  PATH: process.env["PATH"] ?? "",
  PALEBLUEDOT_DATA_DIR: dataDir,
  SERVER_PORT: "0",
  PALEBLUEDOT_AGENT_HOST: "127.0.0.1",
  PALEBLUEDOT_AGENT_PORT: "0",
  PALEBLUEDOT_ENROLMENT_PORT: "0",
  PALEBLUEDOT_LOG_LEVEL: "info",
};

interface Finished {
  readonly code: number | null;
  readonly signal: string | null;
  readonly stdout: string;
  readonly stderr: string;
}

function launch(args: string[], env: Record<string, string> = {}) {
  const child = spawn(process.execPath, [main, ...args], {
    env: { ...environment, ...env },
    stdio: ["ignore", "pipe", "pipe"],
  });
  running.add(child);
  const output = { stdout: "", stderr: "" };
  child.stdout.on("data", (chunk: Buffer) => (output.stdout += chunk.toString()));
  child.stderr.on("data", (chunk: Buffer) => (output.stderr += chunk.toString()));
  const finished = new Promise<Finished>((resolve) => {
    child.once("close", (code, signal) => {
      running.delete(child);
      resolve({ code, signal, ...output });
    });
  });
  return { child, output, finished };
}

async function start(env: Record<string, string> = {}) {
  const process = launch(["run"], env);
  for (const deadline = Date.now() + 90_000; !process.output.stdout.includes("\n");) {
    if (Date.now() > deadline || process.child.exitCode !== null) {
      throw new Error(`the controller did not start: ${process.output.stderr}`);
    }
    await new Promise((resolve) => setTimeout(resolve, 20));
  }
  const addresses = addressesSchema.parse(JSON.parse(process.output.stdout.split("\n")[0] ?? ""));
  const token = readFileSync(addresses.admin_token_file, "utf8").trim();
  return {
    ...process,
    addresses,
    call: (path: string, bearer = token) =>
      fetch(`${addresses.url}${path}`, { headers: { authorization: `Bearer ${bearer}` } }),
  };
}

function postmasterPid(): number {
  return Number(readFileSync(join(dataDir, "postgres", "data", "postmaster.pid"), "utf8").split("\n")[0]);
}

function isAlive(pid: number): boolean {
  try {
    process.kill(pid, 0);
    return true;
  } catch {
    return false;
  }
}

afterEach(async () => {
  for (const child of running) {
    const closed = new Promise((resolve) => child.once("close", resolve));
    child.kill("SIGTERM");
    await closed;
  }
});
afterAll(() => {
  rmSync(dir, { recursive: true, force: true });
});

const incarnationSchema = z.object({ previous_incarnation: z.uuid(), incarnation: z.uuid() });

/** A flat JSON object written again from what was parsed is as long as it was: nothing was said twice. */
const hasEachKeyOnce = (line: string): boolean => JSON.stringify(JSON.parse(line)).length === line.length;

describe("palebluedot-controller", () => {
  test("starts from nothing, says where it is, and stops when it is told to", async () => {
    const controller = await start();
    const mode = (file: string): string => (statSync(join(dataDir, file)).mode & 0o777).toString(8);
    expect(mode("admin-token")).toBe("600");
    expect(mode("secret-key")).toBe("600");
    expect(addressesSchema.parse(JSON.parse(readFileSync(join(dataDir, "controller.json"), "utf8")))).toEqual(
      controller.addresses,
    );
    expect((await controller.call("/readyz")).status).toBe(200);
    expect(await (await controller.call("/api/v1/whoami")).json()).toMatchObject({ role: "admin" });
    const stream = await fetch(`${controller.addresses.url}/api/v1/events`, {
      headers: {
        accept: "text/event-stream",
        authorization: `Bearer ${readFileSync(join(dataDir, "admin-token"), "utf8").trim()}`,
      },
    });
    const postmaster = postmasterPid();
    controller.child.kill("SIGTERM");
    // A reader of a stream does not hold the process up.
    await stream.text().catch(() => "");
    const { code, stdout, stderr } = await controller.finished;
    expect(code).toBe(0);
    const times = ["stopping", "stopped"].map((message) => {
      const lines = stderr.split("\n").filter((line) => line.includes(`"msg":"${message}"`));
      return Date.parse(z.object({ time: z.string() }).parse(JSON.parse(lines[0] ?? "")).time);
    });
    // Less than the 10 s after which open connections are cut.
    expect((times[1] ?? Infinity) - (times[0] ?? 0)).toBeLessThan(9000);
    expect(stdout.trimEnd().split("\n")).toHaveLength(1);
    expect(isAlive(postmaster)).toBe(false);
    for (const line of stderr.trimEnd().split("\n")) expect(line).toSatisfy(hasEachKeyOnce);
  });

  test("killed with -9 it comes back with its tokens and identity", async () => {
    const first = await start();
    const { ca_fingerprint } = first.addresses;
    first.child.kill("SIGKILL");
    await first.finished;
    const second = await start();
    expect(second.addresses.ca_fingerprint).toBe(ca_fingerprint);
    expect((await second.call("/api/v1/whoami")).status).toBe(200);
  });

  test("a new incarnation is refused beside a running controller, and sticks when it has stopped", async () => {
    const controller = await start();
    const refused = await launch(["new-incarnation"]).finished;
    expect(refused).toMatchObject({ code: 1, stdout: "" });
    expect(refused.stderr).toContain("[controller-running]");
    controller.child.kill("SIGTERM");
    await controller.finished;
    const made: { previous_incarnation: string; incarnation: string }[] = [];
    for (let round = 0; round < 2; round += 1) {
      const { code, stdout, stderr } = await launch(["new-incarnation"]).finished;
      expect(code, stderr).toBe(0);
      made.push(incarnationSchema.parse(JSON.parse(stdout)));
    }
    expect(made[1]?.previous_incarnation).toBe(made[0]?.incarnation);
    expect(made[1]?.incarnation).not.toBe(made[0]?.incarnation);
  });

  test("the admin token is reset beside a running controller, which takes it at once", async () => {
    const controller = await start();
    const old = readFileSync(join(dataDir, "admin-token"), "utf8").trim();
    expect((await controller.call("/api/v1/whoami", old)).status).toBe(200);
    const reset = await launch(["admin-token", "reset"]).finished;
    expect(reset).toMatchObject({ code: 0 });
    const fresh = readFileSync(join(dataDir, "admin-token"), "utf8").trim();
    expect(reset.stdout).toBe(`${JSON.stringify({ admin_token_file: join(dataDir, "admin-token") })}\n`);
    expect((await controller.call("/api/v1/whoami", fresh)).status).toBe(200);
    await expect
      .poll(async () => (await controller.call("/api/v1/whoami", old)).status, { timeout: 10_000 })
      .toBe(401);
    expect((await controller.call("/readyz")).status).toBe(200);
  });

  test("a killed database is started again, and requests meanwhile are told so", async () => {
    const controller = await start();
    process.kill(postmasterPid(), "SIGKILL");
    const statuses = new Set<number>();
    await expect
      .poll(
        async () => {
          const { status } = await controller.call("/api/v1/servers");
          statuses.add(status);
          return (
            status === 200 && (await controller.call("/readyz")).status === 200 && isAlive(postmasterPid())
          );
        },
        { timeout: 60_000, interval: 50 },
      )
      .toBe(true);
    expect([...statuses].filter((status) => status !== 200 && status !== 503)).toEqual([]);
    expect(isAlive(controller.addresses.pid)).toBe(true);
  });

  test("wrong settings are told together, and nothing starts", async () => {
    const { code, stdout, stderr } = await launch(["run"], {
      SERVER_PORT: "high",
      DATABASE_URL: "mysql://u:hunter2@h/d",
    }).finished;
    expect(code).toBe(2);
    expect(stdout).toBe("");
    expect(stderr).toContain("SERVER_PORT");
    expect(stderr).toContain("DATABASE_URL");
    expect(stderr).not.toContain("hunter2");
  });

  test("a port in use is told, and the parts started before it are stopped", async () => {
    const controller = await start();
    const taken = new URL(controller.addresses.url).port;
    const second = await launch(["run"], {
      SERVER_PORT: taken,
      PALEBLUEDOT_DATA_DIR: join(dir, "second"),
    }).finished;
    expect(second.code).toBe(1);
    expect(second.stderr).toContain("http-listen-failed");
    expect((await controller.call("/readyz")).status).toBe(200);
  });

  test("migrate brings the schema up and ends", async () => {
    const { code, stdout } = await launch(["migrate"], { PALEBLUEDOT_DATA_DIR: join(dir, "third") }).finished;
    expect(code).toBe(0);
    const all = (await readMigrations()).map((migration) => migration.name);
    expect(all.length).toBeGreaterThan(1);
    expect(JSON.parse(stdout)).toMatchObject({ applied: all });
  });
});
