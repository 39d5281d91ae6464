import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { runInspect, type InspectArguments } from "./inspect.ts";

let dir: string;
beforeEach(() => {
  dir = mkdtempSync(join(tmpdir(), "pbd-inspect-"));
});
afterEach(() => {
  rmSync(dir, { recursive: true, force: true });
});

function file(name: string, content: string): string {
  const path = join(dir, name);
  writeFileSync(path, content);
  return path;
}

const xml = `<?xml version="1.0" ?>
<nvidia_smi_log><driver_version>580.65.06</driver_version><cuda_version>13.0</cuda_version><attached_gpus>1</attached_gpus>
<gpu id="00000000:18:00.0"><product_name>NVIDIA H100 80GB HBM3</product_name>
<uuid>GPU-11111111-2222-3333-4444-555555555555</uuid><serial>N/A</serial>
<fb_memory_usage><total>81559 MiB</total><used>0 MiB</used></fb_memory_usage>
<utilization><gpu_util>N/A</gpu_util></utilization>
<clocks_event_reasons><clocks_event_reason_sw_power_cap>Active</clocks_event_reason_sw_power_cap></clocks_event_reasons>
<remapped_rows>N/A</remapped_rows><gpu_recovery_action>None</gpu_recovery_action>
</gpu></nvidia_smi_log>`;

describe("runInspect", () => {
  it("prints what a document tells, and null for what it does not", async () => {
    const result = await runInspect({ nvidiaSmiXml: file("a.xml", xml) });
    expect(result).toMatchObject({
      gpus: [
        {
          index: 0,
          uuid: "GPU-11111111-2222-3333-4444-555555555555",
          model: "NVIDIA H100 80GB HBM3",
          serial: null,
          pci_bus_id: "00000000:18:00.0",
          driver_version: "580.65.06",
          cuda_version: "13.0",
          memory_total_bytes: 81559 * 1024 * 1024,
          memory_used_bytes: 0,
          temperature_celsius: null,
          power_draw_watts: null,
          utilization_ratio: null,
          ecc: { corrected_volatile: null, uncorrected_volatile: null },
          remapped_rows: { correctable: null, failure: null },
          throttle_reasons: ["sw_power_cap"],
          recovery_action: "None",
          mig: { mode: null, pending: null, devices: null },
        },
      ],
      events: [],
    });
    // undefined would vanish from the JSON document.
    expect(JSON.parse(JSON.stringify(result))).toEqual(result);
  });

  it("reads CSV with header and units as without", async () => {
    const fields = "index,name,utilization.gpu,memory.used";
    const bare = await runInspect({ nvidiaSmiCsv: file("a.csv", "0, Tesla T4, 5, 100\n"), fields });
    const full = await runInspect({
      nvidiaSmiCsv: file(
        "b.csv",
        "index, name, utilization.gpu [%], memory.used [MiB]\n0, Tesla T4, 5 %, 100 MiB\n",
      ),
      fields,
    });
    expect(full).toEqual(bare);
    expect(bare).toMatchObject({
      gpus: [{ index: 0, utilization_ratio: 0.05, memory_used_bytes: 104857600 }],
    });
  });

  it("lists the events of a kernel log, also without a line break at its end", async () => {
    const log =
      "[1.0] systemd: hello\n[12.5] NVRM: Xid (PCI:0000:18:00): 79, pid='<unknown>', name=<unknown>, GPU has fallen off the bus.";
    expect(await runInspect({ kernelLog: file("dmesg", log) })).toEqual({
      gpus: [],
      events: [
        {
          kind: "xid",
          xid: 79,
          sxid: null,
          pci_bus_id: "0000:18:00",
          time: null,
          uptime_seconds: 12.5,
          pid: null,
          process_name: null,
          name: "GPU has fallen off the bus",
          action: "RESTART_BM",
          message: "GPU has fallen off the bus.",
        },
      ],
    });
  });

  const refused: readonly [what: string, code: string, args: () => InspectArguments][] = [
    ["nothing", "nothing-to-inspect", () => ({})],
    ["a missing file", "file-unreadable", () => ({ nvidiaSmiXml: join(dir, "absent") })],
    ["a missing log", "file-unreadable", () => ({ kernelLog: join(dir, "absent") })],
    ["no XML", "smi-document-invalid", () => ({ nvidiaSmiXml: file("x", "hello") })],
    ["CSV without fields", "fields-missing", () => ({ nvidiaSmiCsv: file("x", "0\n") })],
    [
      "CSV of other fields",
      "csv-unreadable",
      () => ({ nvidiaSmiCsv: file("x", "0, 1, 2\n"), fields: "index,pstate" }),
    ],
  ];
  it.each(refused)("refuses %s with a code and a hint", async (_, code, args) => {
    await expect(runInspect(args())).rejects.toMatchObject({ code });
  });
});
