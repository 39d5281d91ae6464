import { execFile } from "node:child_process";
import { readdir, readFile, readlink } from "node:fs/promises";
import { hostname } from "node:os";
import { join } from "node:path";
import { promisify } from "node:util";
import type { HardwareIdentity } from "@palebluedot/shared/generated/palebluedot/agent/v1/enrolment.ts";
import { errorMessage, PlatformError } from "@palebluedot/shared/errors.ts";
import { normaliseMac, normaliseSerial, normaliseUuid } from "@palebluedot/shared/identity.ts";
import { z } from "zod";
import { cleanText } from "../gpu/values.ts";

export interface BmcAddress {
  readonly mac: string;
  readonly address: string;
}

export interface IdentityOptions {
  /** Default /sys. */
  readonly sysfsRoot?: string | undefined;
  /** JSON that replaces what the hardware says: for simulated servers. */
  readonly identityFile?: string | undefined;
  /** Reads the BMC's LAN settings; undefined where there is none. Default: ipmitool, when run as root. */
  readonly readBmc?: (() => Promise<BmcAddress | undefined>) | undefined;
}

const text = z
  .string()
  .max(256)
  .refine((value) => cleanText(value) === value.trim(), "must not hold control characters");

const identityFileSchema = z.strictObject({
  smbios_uuid: text.default(""),
  serial: text.default(""),
  manufacturer: text.default(""),
  product: text.default(""),
  mac_addresses: z.array(text).max(64).default([]),
  bmc_mac: text.default(""),
  bmc_address: text.default(""),
  hostname: text.optional(),
});

/**
 * What the hardware says of itself, normalised: placeholders are "". Throws PlatformError
 * `identity-file-invalid`; whatever sysfs or the BMC does not tell is just absent.
 */
export async function readIdentity(options: IdentityOptions = {}): Promise<HardwareIdentity> {
  if (options.identityFile !== undefined) return readIdentityFile(options.identityFile);
  const sysfsRoot = options.sysfsRoot ?? "/sys";
  const dmi = async (name: string): Promise<string> =>
    cleanText(await readFile(join(sysfsRoot, "class/dmi/id", name), "utf8").catch(() => ""));
  const [uuid, serial, chassisSerial, manufacturer, product, interfaces, bmc] = await Promise.all([
    dmi("product_uuid"),
    dmi("product_serial"),
    dmi("chassis_serial"),
    dmi("sys_vendor"),
    dmi("product_name"),
    physicalInterfaces(sysfsRoot),
    (options.readBmc ?? readBmcByIpmitool)(),
  ]);
  return {
    smbiosUuid: normaliseUuid(uuid),
    serial: normaliseSerial(serial) || normaliseSerial(chassisSerial),
    manufacturer: normaliseSerial(manufacturer),
    product: normaliseSerial(product),
    macAddresses: [...new Set(interfaces.map((nic) => nic.mac).filter((mac) => mac !== ""))].sort(),
    bmcMac: bmc?.mac ?? "",
    bmcAddress: bmc?.address ?? "",
    hostname: hostname(),
  };
}

async function readIdentityFile(file: string): Promise<HardwareIdentity> {
  try {
    const parsed = identityFileSchema.parse(JSON.parse(await readFile(file, "utf8")));
    return {
      smbiosUuid: normaliseUuid(parsed.smbios_uuid),
      serial: normaliseSerial(parsed.serial),
      manufacturer: parsed.manufacturer,
      product: parsed.product,
      macAddresses: parsed.mac_addresses.map(normaliseMac).filter((mac) => mac !== ""),
      bmcMac: normaliseMac(parsed.bmc_mac),
      bmcAddress: parsed.bmc_address,
      hostname: parsed.hostname ?? hostname(),
    };
  } catch (error) {
    throw new PlatformError({
      code: "identity-file-invalid",
      kind: "invalid",
      message: `the identity file ${file} cannot be used: ${errorMessage(error)}`,
      hint: "it is a JSON object with smbios_uuid, serial, manufacturer, product, mac_addresses, bmc_mac, bmc_address and hostname",
      cause: error,
    });
  }
}

export interface PhysicalInterface {
  readonly name: string;
  /** The address burned into the adapter; "" for InfiniBand and where none is told. */
  readonly mac: string;
}

const maxInterfaces = 512;

/**
 * Network interfaces with hardware behind them (a `device` link): no bridges, bonds, VLANs, veth pairs,
 * no loopback. Virtual functions of a card are left out, their addresses are made up at boot. A bond
 * gives its slaves its own address: their permanent one is then the kernel's perm_hwaddr.
 */
export async function physicalInterfaces(sysfsRoot: string): Promise<PhysicalInterface[]> {
  const dir = join(sysfsRoot, "class/net");
  const names: string[] = await readdir(dir).catch(() => []);
  const found: PhysicalInterface[] = [];
  for (const name of names.sort().slice(0, maxInterfaces)) {
    const read = async (file: string): Promise<string> =>
      (await readFile(join(dir, name, file), "utf8").catch(() => "")).trim();
    const device = await readlink(join(dir, name, "device")).catch(() => undefined);
    // A paravirtual or PCI device; USB network functions are often the BMC's own side channel.
    if (device === undefined || (await exists(join(dir, name, "device/physfn")))) continue;
    if (await isUsb(join(dir, name, "device"))) continue;
    // 1 is Ethernet; a bridge or a tunnel with a device link has another type.
    if ((await read("type")) !== "1") {
      found.push({ name, mac: "" });
      continue;
    }
    const permanent = await read("bonding_slave/perm_hwaddr");
    // addr_assign_type 0: the address is the adapter's own; others were set or made up.
    const own = (await read("addr_assign_type")) === "0" ? await read("address") : "";
    found.push({ name, mac: normaliseMac(permanent) || normaliseMac(own) });
  }
  return found;
}

async function isUsb(device: string): Promise<boolean> {
  const subsystem = await readlink(join(device, "subsystem")).catch(() => "");
  return subsystem.endsWith("/usb");
}

async function exists(path: string): Promise<boolean> {
  return readlink(path).then(
    () => true,
    () => false,
  );
}

const run = promisify(execFile);
const ipmitoolDeadlineMs = 10_000;

/** The BMC's own address, from inside the host. Undefined without root, ipmitool or a BMC. */
async function readBmcByIpmitool(): Promise<BmcAddress | undefined> {
  if (process.getuid?.() !== 0) return undefined;
  try {
    const { stdout } = await run("ipmitool", ["lan", "print"], {
      timeout: ipmitoolDeadlineMs,
      killSignal: "SIGKILL",
      maxBuffer: 64 * 1024,
      env: { PATH: process.env["PATH"], LC_ALL: "C" },
    });
    return parseIpmitoolLan(stdout);
  } catch {
    return undefined;
  }
}

/** `ipmitool lan print`. An address of 0.0.0.0 is a BMC that has none. */
export function parseIpmitoolLan(output: string): BmcAddress | undefined {
  const value = (name: string): string => new RegExp(`^${name} +: (\\S+)`, "m").exec(output)?.[1] ?? "";
  const mac = normaliseMac(value("MAC Address"));
  const address = value("IP Address");
  const usable = /^\d{1,3}(\.\d{1,3}){3}$/.test(address) && address !== "0.0.0.0" ? address : "";
  return mac === "" && usable === "" ? undefined : { mac, address: usable };
}
