import { readdir, readFile } from "node:fs/promises";
import { join } from "node:path";

const nvidiaVendor = "0x10de";
const maxDevices = 4096;

/**
 * PCI addresses (0000:18:00.0) of NVIDIA display and 3D controllers, straight from sysfs: tells a host
 * without GPUs from one whose driver is missing. Undefined where sysfs cannot be read.
 */
export async function nvidiaPciDevices(sysfsRoot: string): Promise<string[] | undefined> {
  const dir = join(sysfsRoot, "bus/pci/devices");
  let names: string[];
  try {
    names = await readdir(dir);
  } catch {
    return undefined;
  }
  const found: string[] = [];
  for (const name of names.slice(0, maxDevices)) {
    const [vendor, deviceClass] = await Promise.all(
      ["vendor", "class"].map((file) => readFile(join(dir, name, file), "utf8").catch(() => "")),
    );
    // Base class 03 is a display controller; NVIDIA also makes NICs, audio functions and bridges.
    if (vendor?.trim() === nvidiaVendor && deviceClass?.trim().startsWith("0x03") === true) found.push(name);
  }
  return found.sort();
}

/** NUMA node of a PCI device given as 00000000:18:00.0; undefined when sysfs does not tell (-1). */
export async function pciNumaNode(sysfsRoot: string, pciBusId: string): Promise<number | undefined> {
  const address = pciBusId.toLowerCase().replace(/^0000(?=[0-9a-f]{4}:)/, "");
  if (!/^[0-9a-f]{4}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]$/.test(address)) return undefined;
  try {
    const text = await readFile(join(sysfsRoot, "bus/pci/devices", address, "numa_node"), "utf8");
    const node = Number(text.trim());
    return Number.isSafeInteger(node) && node >= 0 ? node : undefined;
  } catch {
    return undefined;
  }
}
