import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { isPlatformError } from "@palebluedot/shared/errors.ts";
import { afterEach, beforeEach, describe, expect, test } from "vitest";
import { loadConfig } from "./load.ts";

let dir = "";
beforeEach(() => {
  dir = mkdtempSync(join(tmpdir(), "pbd-config-"));
});
afterEach(() => {
  rmSync(dir, { recursive: true });
});

function fileWith(text: string): string {
  const path = join(dir, "controller.json");
  writeFileSync(path, text);
  return path;
}

function faultsOf(env: Record<string, string>): { message: string; settings: string[] } {
  try {
    loadConfig(env);
  } catch (error) {
    if (!isPlatformError(error)) throw error;
    expect(error.code).toBe("config-invalid");
    const faults = (error.details?.["faults"] ?? []) as { setting: string }[];
    return { message: error.message, settings: faults.map((fault) => fault.setting) };
  }
  throw new Error("no fault was reported");
}

describe("loadConfig", () => {
  test("without anything set the defaults hold", () => {
    const config = loadConfig({});
    expect(config.SERVER_PORT).toBe(8080);
    expect(config.DATABASE_URL).toBeUndefined();
    expect(config.NATS_URL).toBeUndefined();
  });

  test("the environment wins over the file, and an empty variable counts as absent", () => {
    const PALEBLUEDOT_CONFIG = fileWith('{"SERVER_PORT": 9000, "SERVER_HOST": "10.0.0.1"}');
    const config = loadConfig({ PALEBLUEDOT_CONFIG, SERVER_PORT: "9001", SERVER_HOST: "" });
    expect(config.SERVER_PORT).toBe(9001);
    expect(config.SERVER_HOST).toBe("10.0.0.1");
  });

  test("all faults are reported together, each with its name", () => {
    const PALEBLUEDOT_CONFIG = fileWith('{"SERVER_PROT": 1, "PALEBLUEDOT_LOG_LEVEL": "loud"}');
    const { settings } = faultsOf({ PALEBLUEDOT_CONFIG, SERVER_PORT: "99999", DATABASE_URL: "mysql://x" });
    expect(settings.sort()).toEqual(["DATABASE_URL", "PALEBLUEDOT_LOG_LEVEL", "SERVER_PORT", "SERVER_PROT"]);
  });

  test("a password in a refused value is not repeated", () => {
    const { message } = faultsOf({ DATABASE_URL: "mysql://root:hunter2@db/x" });
    expect(message).toContain("DATABASE_URL");
    expect(message).not.toContain("hunter2");
    const broken = faultsOf({ PALEBLUEDOT_CONFIG: fileWith('{"DATABASE_URL": "postgres://u:hunter2@h/d"') });
    expect(broken.message).not.toContain("hunter2");
  });

  test.each([
    [
      "a missing file",
      { PALEBLUEDOT_CONFIG: "/nonexistent/controller.json" },
      "/nonexistent/controller.json",
    ],
    ["a certificate without its key", { SERVER_TLS_CERT_FILE: "/c.pem" }, "SERVER_TLS_KEY_FILE"],
    ["two listeners on one port", { SERVER_PORT: "8444" }, "PALEBLUEDOT_AGENT_PORT"],
  ])("%s is a fault", (_name, env, setting) => {
    expect(faultsOf(env).settings).toEqual([setting]);
  });

  test("port 0 may be used for every listener", () => {
    const config = loadConfig({
      SERVER_PORT: "0",
      PALEBLUEDOT_AGENT_PORT: "0",
      PALEBLUEDOT_ENROLMENT_PORT: "0",
    });
    expect(config.PALEBLUEDOT_AGENT_PORT).toBe(0);
  });
});
