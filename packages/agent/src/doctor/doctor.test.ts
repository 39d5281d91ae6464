import { chmodSync, mkdirSync, mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { createServer, type Server } from "node:http";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { execa } from "execa";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import type { AddressInfo } from "node:net";
import { createLogger } from "@palebluedot/shared/logger.ts";
import type { CheckResult, DoctorOptions } from "./checks.ts";
import { doctorOptionsFromEnvironment, runDoctor } from "./command.ts";
import { settings } from "./settings.ts";

let dir: string;
const servers: Server[] = [];

beforeEach(() => {
  dir = mkdtempSync(join(tmpdir(), "pbd-doctor-"));
});
afterEach(async () => {
  await Promise.all(
    servers.splice(0).map(
      (server) =>
        new Promise<void>((resolve) => {
          server.close(() => {
            resolve();
          });
          server.closeAllConnections();
        }),
    ),
  );
  rmSync(dir, { recursive: true, force: true });
});

function options(changes: Partial<DoctorOptions> = {}): DoctorOptions {
  mkdirSync(join(dir, "sysfs/bus/pci/devices"), { recursive: true });
  return {
    nvidiaSmiPath: join(dir, "absent"),
    kernelLogPath: join(dir, "absent"),
    dataDir: dir,
    dockerSocket: join(dir, "absent"),
    controller: undefined,
    identityFile: undefined,
    sysfsRoot: join(dir, "sysfs"),
    log: createLogger({ name: "test", level: "silent" }),
    deadlineMs: 3000,
    ...changes,
  };
}

async function engine(info: object): Promise<string> {
  const socket = join(dir, "docker.sock");
  const server = createServer((_, response) => {
    response.end(JSON.stringify(info));
  });
  servers.push(server);
  await new Promise<void>((resolve) => server.listen(socket, resolve));
  return socket;
}

function find(results: readonly CheckResult[], check: string): CheckResult | undefined {
  return results.find((result) => result.check === check);
}

const settingsFile = (text: string): string => {
  writeFileSync(join(dir, "agent.env"), text);
  return join(dir, "agent.env");
};

describe("the packaged host's settings", () => {
  it("are read as systemd reads them, and what is set wins", async () => {
    const path = settingsFile(
      '# a comment\nPALEBLUEDOT_CONTROLLER=controller.example:8443\nPALEBLUEDOT_CA_FINGERPRINT=\nPALEBLUEDOT_NVIDIA_SMI="/opt/a b/nvidia-smi"\nPALEBLUEDOT_DATA_DIR=/from/file\n',
    );
    const { env, findings } = await settings({ PALEBLUEDOT_DATA_DIR: dir }, path);
    expect(findings).toEqual([]);
    expect(env["PALEBLUEDOT_CA_FINGERPRINT"]).toBeUndefined();
    expect(doctorOptionsFromEnvironment(env)).toMatchObject({
      controller: "controller.example:8443",
      nvidiaSmiPath: "/opt/a b/nvidia-smi",
      dataDir: dir,
    });
  });

  it("may be absent, but not unreadable without a word", async () => {
    expect(await settings({ A: "1" }, join(dir, "none"))).toEqual({ env: { A: "1" }, findings: [] });
    const { findings } = await settings({}, dir);
    expect(findings).toMatchObject([{ check: "settings", status: "warning" }]);
  });

  it("reach the checks of the command", async () => {
    const path = settingsFile("PALEBLUEDOT_CONTROLLER=127.0.0.1:1\n");
    const { stdout } = await execa(
      process.execPath,
      [fileURLToPath(new URL("../main.ts", import.meta.url)), "doctor", "--json", "--env-file", path],
      { env: { PALEBLUEDOT_DATA_DIR: dir }, reject: false, timeout: 60_000 },
    );
    const { checks } = JSON.parse(stdout) as { checks: CheckResult[] };
    expect(find(checks, "controller")?.message).toContain("127.0.0.1:1");
  });
});

describe("doctor", () => {
  it("has a remedy for everything that is missing", async () => {
    const results = await runDoctor(options());
    expect(find(results, "container-engine")?.status).toBe("failed");
    expect(find(results, "certificate")?.status).toBe("warning");
    expect(find(results, "gpu-driver")?.status).toBe("skipped");
    for (const result of results) {
      const bad = result.status === "warning" || result.status === "failed";
      expect(result.remedy !== undefined, result.check).toBe(bad);
    }
  });

  it("tells a missing driver from a host without GPUs", async () => {
    const path = join(dir, "nvidia-smi");
    writeFileSync(
      path,
      '#!/bin/sh\necho "NVIDIA-SMI has failed because it couldn\'t communicate with the NVIDIA driver."\nexit 9\n',
    );
    chmodSync(path, 0o755);
    const result = find(await runDoctor(options({ nvidiaSmiPath: path })), "gpu-driver");
    expect(result?.status).toBe("failed");
    expect(result?.remedy).toContain("modprobe nvidia");
  });

  it("says that a certificate is damaged", async () => {
    mkdirSync(join(dir, "identity"));
    writeFileSync(join(dir, "identity/certificate.pem"), "nonsense");
    expect(find(await runDoctor(options()), "certificate")).toMatchObject({ status: "failed" });
  });

  it("ends although nvidia-smi hangs", async () => {
    const path = join(dir, "nvidia-smi");
    writeFileSync(path, "#!/bin/sh\nexec sleep 600\n");
    chmodSync(path, 0o755);
    const results = await runDoctor(options({ nvidiaSmiPath: path, deadlineMs: 300 }));
    expect(find(results, "nvidia-smi")).toMatchObject({ status: "failed" });
  });

  it.each([
    [{ ServerVersion: "20.10.24", Runtimes: { runc: {} } }, "warning", "device nodes"],
    [{ ServerVersion: "24.0.7", Runtimes: { runc: {}, nvidia: {} } }, "warning", "NVIDIA runtime"],
  ])("judges the engine %j", async (info, status, words) => {
    const results = await runDoctor(options({ dockerSocket: await engine(info) }));
    expect(find(results, "container-engine")?.message).toContain(info.ServerVersion);
    expect(find(results, "gpu-containers")).toMatchObject({ status });
    expect(find(results, "gpu-containers")?.message).toContain(words);
  });

  it("is content with CDI", async () => {
    mkdirSync(join(dir, "cdi"));
    writeFileSync(join(dir, "cdi/nvidia.yaml"), "cdiVersion: 0.6.0\n");
    const info = { ServerVersion: "28.3.0", Runtimes: { runc: {} }, CDISpecDirs: [join(dir, "cdi")] };
    const results = await runDoctor(options({ dockerSocket: await engine(info) }));
    expect(find(results, "gpu-containers")).toMatchObject({ status: "ok" });
  });

  it("says whether the controller can be reached", async () => {
    const server = createServer();
    servers.push(server);
    await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
    const address = `127.0.0.1:${String((server.address() as AddressInfo).port)}`;
    expect(find(await runDoctor(options({ controller: address })), "controller")?.status).toBe("ok");
    expect(find(await runDoctor(options({ controller: "127.0.0.1:1" })), "controller")?.status).toBe(
      "failed",
    );
    expect(find(await runDoctor(options({ controller: "nonsense" })), "controller")?.status).toBe("failed");
  });
});
