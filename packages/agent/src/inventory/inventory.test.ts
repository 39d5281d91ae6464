import { mkdirSync, mkdtempSync, rmSync, symlinkSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { systemClock } from "@palebluedot/shared/clock.ts";
import { createLogger } from "@palebluedot/shared/logger.ts";
import { collectHost, createHostSampler } from "./host.ts";
import { parseIpmitoolLan, physicalInterfaces, readIdentity } from "./identity.ts";

const log = createLogger({ name: "test", level: "silent" });
const noBmc = (): Promise<undefined> => Promise.resolve(undefined);
const someBmc = (): Promise<{ mac: string; address: string }> =>
  Promise.resolve({ mac: "3c:ec:ef:00:00:01", address: "192.0.2.7" });
let sysfs: string;

beforeEach(() => {
  sysfs = mkdtempSync(join(tmpdir(), "pbd-sysfs-"));
});
afterEach(() => {
  rmSync(sysfs, { recursive: true, force: true });
});

function put(path: string, content: string): void {
  const file = join(sysfs, path);
  mkdirSync(join(file, ".."), { recursive: true });
  writeFileSync(file, `${content}\n`);
}

function nic(
  name: string,
  address: string,
  options: { device?: string; assigned?: string; type?: string } = {},
): void {
  put(`class/net/${name}/address`, address);
  put(`class/net/${name}/type`, options.type ?? "1");
  put(`class/net/${name}/addr_assign_type`, options.assigned ?? "0");
  put(`class/net/${name}/operstate`, "up");
  put(`class/net/${name}/speed`, "100000");
  if (options.device === undefined) return;
  mkdirSync(join(sysfs, "devices", options.device), { recursive: true });
  symlinkSync(join(sysfs, "devices", options.device), join(sysfs, "class/net", name, "device"));
}

describe("physicalInterfaces", () => {
  it("takes hardware with its own address, and nothing that software made", async () => {
    nic("ens1f0", "B8:3F:D2:00:92:9A", { device: "0000:18:00.0" });
    // A bond gives its slave its own address; the adapter's is perm_hwaddr.
    nic("ens1f1", "02:00:00:00:00:99", { device: "0000:18:00.1", assigned: "3" });
    put("class/net/ens1f1/bonding_slave/perm_hwaddr", "b8:3f:d2:00:92:9b");
    nic("bond0", "02:00:00:00:00:99", { assigned: "3" });
    nic("docker0", "02:42:ac:11:00:01", { assigned: "3" });
    nic("veth12ab", "5a:00:00:00:00:01", { assigned: "1" });
    nic("lo", "00:00:00:00:00:00", { type: "772" });
    // A virtual function: its address is made up at boot.
    nic("ens1f0v0", "52:00:00:00:00:01", { device: "0000:18:02.0", assigned: "1" });
    symlinkSync("../0000:18:00.0", join(sysfs, "devices/0000:18:02.0/physfn"));
    // The BMC's network over USB: the same address on every server of a model.
    nic("usb0", "be:3a:f2:b6:05:9f", { device: "1-1:1.0" });
    mkdirSync(join(sysfs, "bus/usb"), { recursive: true });
    symlinkSync("../../bus/usb", join(sysfs, "devices/1-1:1.0/subsystem"));
    // Somebody set this address by hand.
    nic("ens2", "02:aa:bb:cc:dd:ee", { device: "0000:3b:00.0", assigned: "3" });
    nic("ib0", "00:00:10:29:fe:80:00:00:00:00:00:00:b8:3f:d2:03:00:92:9a:b0", {
      device: "0000:5d:00.0",
      type: "32",
    });
    expect(await physicalInterfaces(sysfs)).toEqual([
      { name: "ens1f0", mac: "b8:3f:d2:00:92:9a" },
      { name: "ens1f1", mac: "b8:3f:d2:00:92:9b" },
      { name: "ens2", mac: "" },
      { name: "ib0", mac: "" },
    ]);
  });

  it("finds none where there is no sysfs", async () => {
    expect(await physicalInterfaces(join(sysfs, "absent"))).toEqual([]);
  });
});

describe("readIdentity", () => {
  it("normalises what the firmware says and drops its placeholders", async () => {
    put("class/dmi/id/product_uuid", "4C4C4544-0053-5A10-8044-B7C04F564233");
    put("class/dmi/id/product_serial", "To be filled by O.E.M.");
    put("class/dmi/id/chassis_serial", "CN7792194A0123");
    put("class/dmi/id/sys_vendor", "Supermicro");
    put("class/dmi/id/product_name", "Default string");
    nic("eth0", "b8:3f:d2:00:92:9a", { device: "0000:18:00.0" });
    expect(await readIdentity({ sysfsRoot: sysfs, readBmc: someBmc })).toMatchObject({
      smbiosUuid: "4c4c4544-0053-5a10-8044-b7c04f564233",
      serial: "CN7792194A0123",
      manufacturer: "Supermicro",
      product: "",
      macAddresses: ["b8:3f:d2:00:92:9a"],
      bmcMac: "3c:ec:ef:00:00:01",
      bmcAddress: "192.0.2.7",
    });
  });

  it("takes a file in place of the hardware, by the same rules", async () => {
    put(
      "identity.json",
      JSON.stringify({
        smbios_uuid: "FFFFFFFF-FFFF-FFFF-FFFF-FFFFFFFFFFFF",
        serial: "SIM1",
        mac_addresses: ["02-00-00-00-00-01"],
        hostname: "node-1",
      }),
    );
    expect(await readIdentity({ identityFile: join(sysfs, "identity.json") })).toMatchObject({
      smbiosUuid: "",
      serial: "SIM1",
      macAddresses: ["02:00:00:00:00:01"],
      hostname: "node-1",
    });
  });

  it.each(["{", '{"serial": 5}', '{"unknown": "x"}', '{"serial": "a\\u0007b"}'])(
    "refuses the file %s",
    async (content) => {
      put("identity.json", content);
      await expect(readIdentity({ identityFile: join(sysfs, "identity.json") })).rejects.toMatchObject({
        code: "identity-file-invalid",
      });
    },
  );
});

describe("parseIpmitoolLan", () => {
  it.each([
    [
      "IP Address Source       : DHCP Address\nIP Address              : 10.0.0.9\nMAC Address             : 3C:EC:EF:00:00:01\n",
      { mac: "3c:ec:ef:00:00:01", address: "10.0.0.9" },
    ],
    [
      "IP Address              : 0.0.0.0\nMAC Address             : 3c:ec:ef:00:00:01\n",
      { mac: "3c:ec:ef:00:00:01", address: "" },
    ],
    ["Invalid channel: 255\n", undefined],
  ])("%j", (output, expected) => {
    expect(parseIpmitoolLan(output)).toEqual(expected);
  });
});

describe("collectHost", () => {
  it("describes the machine that the test runs on", async () => {
    const host = await collectHost({ log, readBmc: noBmc, driverVersion: "580.65.06" });
    expect(host.cpuThreads).toBeGreaterThan(0);
    expect(host.memoryTotalBytes).toBeGreaterThan(0);
    expect(host.kernelVersion).not.toBe("");
    expect(host.driverVersion).toBe("580.65.06");
  });

  it("takes interfaces and NUMA nodes from the given sysfs", async () => {
    nic("eth0", "b8:3f:d2:00:92:9a", { device: "0000:18:00.0" });
    mkdirSync(join(sysfs, "devices/system/node/node0"), { recursive: true });
    mkdirSync(join(sysfs, "devices/system/node/node1"), { recursive: true });
    const host = await collectHost({ log, sysfsRoot: sysfs, readBmc: noBmc });
    expect(host.numaNodes).toBe(2);
    expect(host.networkInterfaces).toMatchObject([
      { name: "eth0", mac: "b8:3f:d2:00:92:9a", speedMbps: 100000, operationalState: "up" },
    ]);
  });
});

describe("createHostSampler", () => {
  it("tells the share of CPU since the call before, and none at first", async () => {
    put("meminfo", "MemTotal:       1000 kB\nMemFree: 100 kB\nMemAvailable:    400 kB");
    put("stat", "cpu  100 0 0 900 0 0 0 0 0 0\ncpu0 1 2 3");
    const sample = createHostSampler({ clock: systemClock, procRoot: sysfs });
    expect((await sample()).cpuUtilizationRatio).toBeUndefined();
    put("stat", "cpu  175 0 0 925 0 0 0 0 0 0\ncpu0 1 2 3");
    expect(await sample()).toMatchObject({ cpuUtilizationRatio: 0.75, memoryUsedBytes: 600 * 1024 });
  });
});
