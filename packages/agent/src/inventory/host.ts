import { readFile } from "node:fs/promises";
import { cpus, freemem, loadavg, networkInterfaces, totalmem } from "node:os";
import { readdir } from "node:fs/promises";
import { join } from "node:path";
import type {
  ContainerEngine,
  Disk,
  HostInventory,
  HostSample,
  NetworkInterface,
} from "@palebluedot/shared/generated/palebluedot/agent/v1/agent.ts";
import type { Clock } from "@palebluedot/shared/clock.ts";
import { errorMessage } from "@palebluedot/shared/errors.ts";
import type { Logger } from "@palebluedot/shared/logger.ts";
import { normaliseMac, normaliseSerial } from "@palebluedot/shared/identity.ts";
import type { Systeminformation } from "systeminformation";
import { cleanText, uint32, uint64 } from "../gpu/values.ts";
import { physicalInterfaces, readIdentity, type IdentityOptions } from "./identity.ts";

export interface HostOptions extends IdentityOptions {
  readonly log: Logger;
  /** From the GPU monitor's last snapshot. */
  readonly driverVersion?: string | undefined;
  readonly cudaVersion?: string | undefined;
  readonly containerEngine?: ContainerEngine | undefined;
  readonly metricsPort?: number | undefined;
  readonly metricsTls?: boolean | undefined;
  /** Of each part that systeminformation reads by other programs. Default 20,000. */
  readonly deadlineMs?: number | undefined;
}

/**
 * What this host is. Slow (it starts lsblk and others): call it at start and a few times a day, never in
 * a loop. A part that fails or hangs is left empty and logged; only a bad identity file throws.
 */
export async function collectHost(options: HostOptions): Promise<HostInventory> {
  const sysfsRoot = options.sysfsRoot ?? "/sys";
  // Imported late: it costs several MiB that an agent needs for a second per day.
  const si = await import("systeminformation");
  const within = async <T>(part: string, work: Promise<T>): Promise<T | undefined> => {
    const deadlineMs = options.deadlineMs ?? 20_000;
    let timer: NodeJS.Timeout | undefined;
    try {
      return await Promise.race([
        work,
        new Promise<never>((_, reject) => {
          timer = setTimeout(() => {
            reject(new Error(`no answer within ${String(deadlineMs)} ms`));
          }, deadlineMs);
        }),
      ]);
    } catch (error) {
      options.log.warn({ part, error: errorMessage(error) }, "a part of the inventory is missing");
      return undefined;
    } finally {
      clearTimeout(timer);
    }
  };
  const identity = await readIdentity(options);
  const [os, cpu, bios, disks, nics, numaNodes] = await Promise.all([
    within("os", si.osInfo()),
    within("cpu", si.cpu()),
    within("bios", si.bios()),
    within("disks", si.diskLayout()),
    within("network", readNetwork(sysfsRoot)),
    countNumaNodes(sysfsRoot),
  ]);
  return {
    hostname: identity.hostname,
    osName: cleanText(os?.distro ?? ""),
    osVersion: cleanText(os?.release ?? ""),
    kernelVersion: cleanText(os?.kernel ?? ""),
    architecture: cleanText(os?.arch ?? process.arch),
    cpuModel:
      cleanText([cpu?.manufacturer, cpu?.brand].filter(Boolean).join(" ")) || (cpus()[0]?.model ?? ""),
    cpuSockets: uint32(cpu?.processors) ?? 0,
    cpuCores: uint32(cpu?.physicalCores) ?? 0,
    cpuThreads: uint32(cpu?.cores) ?? cpus().length,
    memoryTotalBytes: totalmem(),
    disks: (disks ?? []).slice(0, 256).map(toDisk),
    networkInterfaces: nics ?? [],
    smbiosUuid: identity.smbiosUuid,
    serial: identity.serial,
    manufacturer: identity.manufacturer,
    product: identity.product,
    biosVersion: cleanText(bios?.version ?? ""),
    bmcAddress: identity.bmcAddress,
    bmcMac: identity.bmcMac,
    containerEngine: options.containerEngine,
    driverVersion: options.driverVersion ?? "",
    cudaVersion: options.cudaVersion ?? "",
    numaNodes,
    metricsPort: options.metricsPort,
    metricsTls: options.metricsTls,
  };
}

function toDisk(disk: Systeminformation.DiskLayoutData): Disk {
  return {
    name: cleanText(disk.device).replace(/^\/dev\//, ""),
    model: cleanText(disk.name),
    serial: normaliseSerial(disk.serialNum),
    sizeBytes: uint64(disk.size) ?? 0,
    kind: cleanText(disk.interfaceType === "NVMe" ? "NVMe" : disk.type),
  };
}

/** Physical interfaces only: containers' veth pairs come and go and would change the inventory each time. */
async function readNetwork(sysfsRoot: string): Promise<NetworkInterface[]> {
  const addresses = networkInterfaces();
  const found: NetworkInterface[] = [];
  for (const nic of await physicalInterfaces(sysfsRoot)) {
    const read = async (file: string): Promise<string> =>
      (await readFile(join(sysfsRoot, "class/net", nic.name, file), "utf8").catch(() => "")).trim();
    // An interface that is down answers EINVAL, a virtual one -1.
    const speed = Number((await read("speed")) || 0);
    found.push({
      name: cleanText(nic.name),
      mac: nic.mac === "" ? normaliseMac(await read("address")) : nic.mac,
      addresses: (addresses[nic.name] ?? []).map((address) => address.address),
      speedMbps: Number.isSafeInteger(speed) && speed > 0 ? speed : 0,
      operationalState: cleanText(await read("operstate")),
    });
  }
  return found;
}

async function countNumaNodes(sysfsRoot: string): Promise<number> {
  const names: string[] = await readdir(join(sysfsRoot, "devices/system/node")).catch(() => []);
  return names.filter((name) => /^node\d+$/.test(name)).length;
}

/**
 * CPU, memory and load, straight from the kernel: no child, no file beyond /proc. The CPU share is of
 * the time since the previous call, so the first call tells none.
 */
export function createHostSampler(options: {
  readonly clock: Clock;
  readonly procRoot?: string | undefined;
}): () => Promise<HostSample> {
  const procRoot = options.procRoot ?? "/proc";
  let before: { readonly idle: number; readonly total: number } | undefined;
  return async () => {
    const [memory, stat] = await Promise.all(
      ["meminfo", "stat"].map((file) => readFile(join(procRoot, file), "utf8").catch(() => "")),
    );
    const now = cpuTicks(stat ?? "");
    const elapsed = now === undefined || before === undefined ? 0 : now.total - before.total;
    const idle = now === undefined || before === undefined ? 0 : now.idle - before.idle;
    before = now;
    const availableKib = /^MemAvailable:\s+(\d+) kB$/m.exec(memory ?? "")?.[1];
    const total = /^MemTotal:\s+(\d+) kB$/m.exec(memory ?? "")?.[1];
    const usedBytes =
      availableKib === undefined || total === undefined
        ? totalmem() - freemem()
        : (Number(total) - Number(availableKib)) * 1024;
    return {
      timeUnixMs: options.clock.now(),
      cpuUtilizationRatio: elapsed > 0 ? Math.min(1, Math.max(0, 1 - idle / elapsed)) : undefined,
      memoryUsedBytes: usedBytes,
      load1m: loadavg()[0],
    };
  };
}

function cpuTicks(stat: string): { readonly idle: number; readonly total: number } | undefined {
  const ticks = /^cpu +([\d ]+)$/m.exec(stat)?.[1]?.trim().split(/ +/).map(Number);
  if (ticks === undefined || ticks.length < 5) return undefined;
  // user, nice, system, idle, iowait, irq, softirq, steal; guest time is part of user time already.
  const counted = ticks.slice(0, 8);
  return {
    idle: (counted[3] ?? 0) + (counted[4] ?? 0),
    total: counted.reduce((sum, value) => sum + value, 0),
  };
}
