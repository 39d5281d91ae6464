/** Lines of a simulated kernel log, in the forms an agent reads. */
import { readFileSync } from "node:fs";
import { ctime } from "./nvidia-smi/text.ts";
import { paths } from "./nvidia-smi/state.ts";

const messages: Readonly<Record<number, string>> = {
  13: "Graphics SM Warp Exception on (GPC 0, TPC 0, SM 0): Out Of Range Address",
  31: "Ch 00000008, intr 00000000. MMU Fault: ENGINE GRAPHICS GPC0 GPCCLIENT_T1_0 faulted @ 0x7f00_00000000. Fault is of type FAULT_PDE ACCESS_TYPE_VIRT_READ",
  43: "Ch 00000008",
  48: "An uncorrectable double bit error (DBE) has been detected on GPU in the framebuffer at partition 0, subpartition 0.",
  63: "Row Remapper: New row marked for remapping, reset gpu to activate.",
  64: "Row Remapper: Failed to remap a row.",
  74: "NVLink: fatal error detected on link 0(0x10000, 0x0, 0x0, 0x0, 0x0, 0x0, 0x0)",
  79: "GPU has fallen off the bus.",
  92: "High single-bit ECC error rate",
  94: "Contained: SM (0x1). RST: No, D-RST: No",
  95: "Uncontained: LTC TAG (0x2,0x0). RST: Yes, D-RST: No",
  119: "Timeout after 6s of waiting for RPC response from GPU0 GSP! Expected function 76 (GSP_RM_CONTROL) (0x20801813 0x4c).",
  149: "NETIR_LINK_EVT Fatal XC0 i0 Link 08 (0x026001c6 0x00000000 0x00000000 0x00000000)",
  154: "GPU recovery action changed from 0x0 (None) to 0x1 (GPU Reset Required)",
};

/** What the driver usually writes after the number of an Xid. */
export function defaultXidMessage(xid: number): string {
  return messages[xid] ?? "Simulated error";
}

function nextSequence(dir: string): number {
  try {
    const lines = readFileSync(paths.kernelLog(dir), "utf8").trimEnd().split("\n");
    for (const line of lines.toReversed()) {
      const sequence = /^\d+,(\d+),/.exec(line)?.[1];
      if (sequence !== undefined) return Number(sequence) + 1;
    }
  } catch {
    // No log yet.
  }
  return 1000;
}

/** One line without its end. `uptimeSeconds` becomes the time stamp of a kmsg record (microseconds since boot). */
export function kernelLogLine(
  dir: string,
  message: string,
  form: "kmsg" | "dmesg",
  nowMs: number,
  uptimeSeconds: number,
): string {
  // A log is one record a line; a message must not start another.
  const oneLine = message.replaceAll(/[\r\n]+/g, " ");
  return form === "dmesg"
    ? `[${ctime(nowMs)}] ${oneLine}`
    : `4,${nextSequence(dir)},${Math.round(uptimeSeconds * 1e6)},-;${oneLine}`;
}
