/** A small sysfs tree for a simulated server: DMI, network cards and GPU NUMA nodes. */
import { mkdirSync, symlinkSync, writeFileSync } from "node:fs";
import { dirname, join } from "node:path";
import type { ServerDescription } from "./nvidia-smi/state.ts";
import type { SimulatedIdentity } from "./server.ts";

/** Writes the tree under `root` (which stands for /sys). */
export function writeSysfs(root: string, server: ServerDescription, identity: SimulatedIdentity): void {
  const put = (path: string, value: string): void => {
    const file = join(root, path);
    mkdirSync(dirname(file), { recursive: true });
    writeFileSync(file, `${value}\n`);
  };
  put("class/dmi/id/product_uuid", identity.smbios_uuid);
  put("class/dmi/id/product_serial", identity.serial);
  put("class/dmi/id/sys_vendor", identity.manufacturer);
  put("class/dmi/id/product_name", identity.product);
  for (const [index, address] of identity.mac_addresses.entries()) {
    put(`class/net/eth${index}/address`, address);
    put(`class/net/eth${index}/operstate`, "up");
    put(`class/net/eth${index}/speed`, "100000");
    put(`class/net/eth${index}/type`, "1");
    put(`class/net/eth${index}/addr_assign_type`, "0");
    // As in the kernel's tree the card is a link: that is how hardware is told from bridges and veth pairs.
    const card = join(root, `devices/pci0000:00/0000:e${index}:00.0`);
    put(`devices/pci0000:00/0000:e${index}:00.0/vendor`, "0x15b3");
    symlinkSync(card, join(root, `class/net/eth${index}/device`));
  }
  for (const node of new Set(server.gpus.map((gpu) => gpu.numaNode))) {
    put(`devices/system/node/node${node}/cpulist`, "0");
  }
  for (const gpu of server.gpus) {
    const address = gpu.pciBusId.slice(4).toLowerCase();
    put(`bus/pci/devices/${address}/numa_node`, String(gpu.numaNode));
    put(`bus/pci/devices/${address}/vendor`, "0x10de");
    put(`bus/pci/devices/${address}/class`, "0x030200");
  }
}
