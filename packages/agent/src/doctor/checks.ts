import { execFile } from "node:child_process";
import { X509Certificate } from "node:crypto";
import { constants } from "node:fs";
import { access, open, readdir, readFile, statfs } from "node:fs/promises";
import { request } from "node:http";
import { connect } from "node:net";
import { join } from "node:path";
import { systemClock } from "@palebluedot/shared/clock.ts";
import { errorMessage } from "@palebluedot/shared/errors.ts";
import type { Logger } from "@palebluedot/shared/logger.ts";
import { z } from "zod";
import { nvidiaPciDevices } from "../gpu/pci-devices.ts";
import { readSmiDocument } from "../gpu/smi-document.ts";
import { createSmiRunner } from "../gpu/smi-runner.ts";
import { cleanText } from "../gpu/values.ts";
import { readIdentity } from "../inventory/identity.ts";

type CheckStatus = "ok" | "warning" | "failed" | "skipped";

export interface CheckResult {
  /** Stable kebab-case name. */
  readonly check: string;
  readonly status: CheckStatus;
  readonly message: string;
  /** What to do; only where something is to be done. */
  readonly remedy?: string | undefined;
}

export interface DoctorOptions {
  readonly nvidiaSmiPath: string;
  readonly kernelLogPath: string;
  readonly dataDir: string;
  /** Unix socket path of the container engine. */
  readonly dockerSocket: string;
  /** host:port; undefined: not configured. */
  readonly controller: string | undefined;
  readonly identityFile: string | undefined;
  readonly sysfsRoot: string;
  readonly log: Logger;
  readonly deadlineMs: number;
}

/** Every check, a line each; they run at once, each under the deadline, and none throws. */
export const checks: readonly ((options: DoctorOptions) => Promise<readonly CheckResult[]>)[] = [
  checkGpus,
  checkEngine,
  checkKernelLog,
  checkIdentity,
  checkIpmitool,
  checkClock,
  checkDisk,
  checkCertificate,
  checkController,
];

async function checkGpus(options: DoctorOptions): Promise<readonly CheckResult[]> {
  const devices = await nvidiaPciDevices(options.sysfsRoot);
  const runner = createSmiRunner({
    path: options.nvidiaSmiPath,
    env: process.env,
    clock: systemClock,
    log: options.log,
  });
  const look = await readSmiDocument(runner, options.deadlineMs);
  await runner.stop();
  if ("gpus" in look) {
    const off = look.gpus.filter((gpu) => gpu.persistenceMode === false).length;
    return [
      ok("nvidia-smi", "answers"),
      ok("gpu-driver", `driver ${look.driverVersion ?? "unknown"}, ${String(look.gpus.length)} GPUs`),
      off === 0
        ? ok("persistence-mode", "on")
        : warning(
            "persistence-mode",
            `off on ${String(off)} GPUs: every query initialises them anew`,
            "enable nvidia-persistenced, or run `nvidia-smi -pm 1`",
          ),
      look.complete
        ? ok("gpus", "all can be opened")
        : failed(
            "gpus",
            `cannot be opened: ${look.unreachable.join(", ") || "some"}`,
            "see the kernel log for Xids; reboot the host",
          ),
    ];
  }
  if (look.reason === "nvidia-smi-missing" && devices !== undefined && devices.length === 0) {
    return [skipped("nvidia-smi", "no NVIDIA GPU on the PCI bus"), skipped("gpu-driver", "no GPU")];
  }
  const remedies: Readonly<Record<string, string>> = {
    "nvidia-smi-missing": "install the NVIDIA driver's utilities, or set PALEBLUEDOT_NVIDIA_SMI",
    "driver-not-loaded": "install the NVIDIA driver for this kernel and load it: `modprobe nvidia`",
    "driver-library-mismatch": "the driver was updated under a loaded module: reboot, or reload nvidia.ko",
    "no-devices": "the driver is loaded, but no GPU answers: see the kernel log",
    unresponsive: "nvidia-smi hangs: see the kernel log for Xid 119 or 120; a reboot is likely needed",
    "permission-denied": "the agent must be allowed to open /dev/nvidiactl: run it as root",
  };
  return [failed(look.component, look.message, remedies[look.reason] ?? "see the kernel log")];
}

/** What is read of the Docker Engine API's GET /info; CDISpecDirs exists from 1.44 (Docker 25) on. */
const engineInfoSchema = z.object({
  ServerVersion: z.string().default("unknown"),
  Runtimes: z.record(z.string(), z.unknown()).nullish(),
  CDISpecDirs: z.array(z.string()).nullish(),
});

async function checkEngine(options: DoctorOptions): Promise<readonly CheckResult[]> {
  let info: z.infer<typeof engineInfoSchema>;
  try {
    info = engineInfoSchema.parse(await dockerGet(options.dockerSocket, "/info", options.deadlineMs));
  } catch (error) {
    return [
      failed(
        "container-engine",
        `nothing answers at ${options.dockerSocket}: ${cleanText(errorMessage(error))}`,
        "install Docker Engine 25 or later and start it, or set DOCKER_HOST",
      ),
    ];
  }
  const version = cleanText(info.ServerVersion);
  const runtimes = Object.keys(info.Runtimes ?? {});
  const directories = info.CDISpecDirs ?? [];
  const specs = await cdiSpecs(directories);
  const results = [ok("container-engine", `version ${version}`)];
  const ctk = await runs("nvidia-ctk", ["--version"], options.deadlineMs);
  if (directories.length > 0 && specs.length > 0) {
    results.push(ok("gpu-containers", `CDI: ${specs.join(", ")}`));
  } else if (runtimes.includes("nvidia")) {
    results.push(
      warning(
        "gpu-containers",
        "the NVIDIA runtime is there, but no CDI specification",
        "prefer CDI: `nvidia-ctk cdi generate --output=/var/run/cdi/nvidia.yaml --device-name-strategy=uuid`",
      ),
    );
  } else {
    results.push(
      warning(
        "gpu-containers",
        "neither CDI nor the NVIDIA runtime: GPUs can only be handed over as device nodes",
        ctk
          ? "`nvidia-ctk cdi generate --output=/var/run/cdi/nvidia.yaml --device-name-strategy=uuid`, and Docker Engine 25 or later"
          : "install the NVIDIA Container Toolkit",
      ),
    );
  }
  return results;
}

async function cdiSpecs(directories: readonly string[]): Promise<string[]> {
  const found: string[] = [];
  for (const dir of directories.slice(0, 8)) {
    const names: string[] = await readdir(dir).catch(() => []);
    found.push(...names.filter((name) => /nvidia.*\.(yaml|json)$/.test(name)).map((name) => join(dir, name)));
  }
  return found;
}

async function checkKernelLog(options: DoctorOptions): Promise<readonly CheckResult[]> {
  if (options.kernelLogPath === "none") return [skipped("kernel-log", "left to others")];
  try {
    const handle = await open(options.kernelLogPath, constants.O_RDONLY | constants.O_NONBLOCK);
    await handle.close();
    return [ok("kernel-log", `${options.kernelLogPath} can be read`)];
  } catch (error) {
    return [
      warning(
        "kernel-log",
        `${options.kernelLogPath} cannot be read (${cleanText(errorMessage(error))}): Xids are not seen`,
        "run the agent as root or with CAP_SYSLOG, or set PALEBLUEDOT_KERNEL_LOG to a log file",
      ),
    ];
  }
}

async function checkIdentity(options: DoctorOptions): Promise<readonly CheckResult[]> {
  const { identityFile, sysfsRoot } = options;
  const identity = await readIdentity({
    identityFile,
    sysfsRoot,
    readBmc: () => Promise.resolve(undefined),
  });
  const known = [identity.smbiosUuid, identity.serial].filter((value) => value !== "");
  if (known.length > 0) return [ok("hardware-identity", `serial ${identity.serial || "unknown"}`)];
  return [
    warning(
      "hardware-identity",
      "neither SMBIOS UUID nor serial identify this server",
      identity.macAddresses.length > 0
        ? "it is matched by MAC address only; run the agent as root, or have the vendor program the serial"
        : "run the agent as root; a server without identity needs a token bound to it",
    ),
  ];
}

async function checkIpmitool(options: DoctorOptions): Promise<readonly CheckResult[]> {
  const device = await access("/dev/ipmi0").then(
    () => true,
    () => false,
  );
  if (!device) return [skipped("ipmitool", "no /dev/ipmi0: no BMC is reachable from inside")];
  return (await runs("ipmitool", ["-V"], options.deadlineMs))
    ? [ok("ipmitool", "installed")]
    : [warning("ipmitool", "not installed: the BMC's address is not reported", "install ipmitool")];
}

async function checkClock(options: DoctorOptions): Promise<readonly CheckResult[]> {
  const synchronised = await output(
    "timedatectl",
    ["show", "--property=NTPSynchronized", "--value"],
    options.deadlineMs,
  );
  if (synchronised === undefined) return [skipped("clock", "timedatectl does not tell")];
  return synchronised.trim() === "yes"
    ? [ok("clock", "synchronised")]
    : [warning("clock", "not synchronised", "enable chrony or systemd-timesyncd")];
}

const gib = 1024 ** 3;
const freeWantedBytes = 10 * gib;

async function checkDisk(options: DoctorOptions): Promise<readonly CheckResult[]> {
  for (const dir of [options.dataDir, "/"]) {
    const stat = await statfs(dir).catch(() => undefined);
    if (stat === undefined) continue;
    const free = stat.bavail * stat.bsize;
    const words = `${(free / gib).toFixed(1)} GiB free on ${dir}`;
    return free >= freeWantedBytes
      ? [ok("disk-space", words)]
      : [warning("disk-space", words, "images and volumes need space: at least 10 GiB")];
  }
  return [skipped("disk-space", "cannot be read")];
}

async function checkCertificate(options: DoctorOptions): Promise<readonly CheckResult[]> {
  const file = join(options.dataDir, "identity/certificate.pem");
  const bytes = await readFile(file).catch(() => undefined);
  if (bytes === undefined) {
    return [
      warning(
        "certificate",
        `${file} cannot be read: this host is not enrolled, or doctor does not run as the agent's user`,
        "start the agent with PALEBLUEDOT_JOIN_TOKEN_FILE",
      ),
    ];
  }
  const certificate = parseCertificate(bytes);
  if (certificate === undefined) {
    return [failed("certificate", `${file} is damaged`, "remove it and start the agent: it enrols again")];
  }
  const end = new Date(certificate.validTo);
  return end.getTime() > Date.now()
    ? [ok("certificate", `valid until ${end.toISOString()}`)]
    : [warning("certificate", `expired on ${end.toISOString()}`, "start the agent: it renews by itself")];
}

function parseCertificate(bytes: Buffer): X509Certificate | undefined {
  try {
    return new X509Certificate(bytes);
  } catch {
    return undefined;
  }
}

function checkController(options: DoctorOptions): Promise<readonly CheckResult[]> {
  const { controller } = options;
  if (controller === undefined) {
    return Promise.resolve([
      warning("controller", "no controller is configured", "set PALEBLUEDOT_CONTROLLER to host:port"),
    ]);
  }
  const url = URL.parse(`tcp://${controller.replace(/^https?:\/\//, "")}`);
  if (url === null || url.port === "") {
    return Promise.resolve([
      failed("controller", `${cleanText(controller)} is no host:port`, "set PALEBLUEDOT_CONTROLLER"),
    ]);
  }
  return new Promise((resolve) => {
    const socket = connect({ host: url.hostname.replace(/^\[|\]$/g, ""), port: Number(url.port) });
    const finish = (result: CheckResult): void => {
      socket.destroy();
      resolve([result]);
    };
    socket.setTimeout(options.deadlineMs, () => {
      finish(failed("controller", `${controller} does not answer`, "check routes and firewalls"));
    });
    socket.once("connect", () => {
      finish(ok("controller", `${controller} accepts connections`));
    });
    socket.once("error", (error) => {
      finish(
        failed(
          "controller",
          `${controller}: ${cleanText(error.message)}`,
          "check address, routes and firewalls",
        ),
      );
    });
  });
}

function dockerGet(socketPath: string, path: string, deadlineMs: number): Promise<unknown> {
  return new Promise((resolve, reject) => {
    const call = request(
      { socketPath, path, headers: { host: "docker" }, signal: AbortSignal.timeout(deadlineMs) },
      (response) => {
        const chunks: Buffer[] = [];
        let size = 0;
        response.on("data", (chunk: Buffer) => {
          size += chunk.length;
          if (size > 4 * 1024 * 1024) call.destroy(new Error("the answer is too large"));
          chunks.push(chunk);
        });
        response.on("error", reject);
        response.on("end", () => {
          try {
            resolve(JSON.parse(Buffer.concat(chunks).toString("utf8")));
          } catch (error) {
            reject(error instanceof Error ? error : new Error("no JSON"));
          }
        });
      },
    );
    call.on("error", reject);
    call.end();
  });
}

async function runs(command: string, args: readonly string[], deadlineMs: number): Promise<boolean> {
  return (await output(command, args, deadlineMs)) !== undefined;
}

/** Standard output, or undefined when the program is missing, fails, or is too slow. */
function output(command: string, args: readonly string[], deadlineMs: number): Promise<string | undefined> {
  return new Promise((resolve) => {
    execFile(
      command,
      [...args],
      { timeout: deadlineMs, killSignal: "SIGKILL", maxBuffer: 64 * 1024 },
      (error, stdout) => {
        resolve(error === null ? stdout : undefined);
      },
    );
  });
}

function ok(check: string, message: string): CheckResult {
  return { check, status: "ok", message };
}
function warning(check: string, message: string, remedy: string): CheckResult {
  return { check, status: "warning", message, remedy };
}
function failed(check: string, message: string, remedy: string): CheckResult {
  return { check, status: "failed", message, remedy };
}
function skipped(check: string, message: string): CheckResult {
  return { check, status: "skipped", message };
}
