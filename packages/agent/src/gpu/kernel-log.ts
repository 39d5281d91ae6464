import { xidMeaning, type XidAction } from "@palebluedot/shared/xid-catalog.ts";
import { cleanText } from "./values.ts";

/** What the NVIDIA driver wrote to the kernel log about one device. */
export interface KernelGpuEvent {
  readonly kind: "xid" | "sxid" | "fallen-off-bus";
  /** Xid or SXid number; undefined for a GPU that fell off the bus without one. */
  readonly number: number | undefined;
  /** As the driver prints it, completed: "0000:18:00". */
  readonly pciBusId: string;
  readonly pid: number | undefined;
  readonly processName: string | undefined;
  readonly message: string;
  /** Wall clock where the line tells it (syslog without a year does not). */
  readonly timeUnixMs: number | undefined;
  /** Seconds since boot, where the line tells that instead. */
  readonly uptimeSeconds: number | undefined;
  /** From NVIDIA's catalogue; undefined for SXids and numbers that it does not hold. */
  readonly name: string | undefined;
  readonly action: XidAction | undefined;
}

/** A kernel message has at most 1 kB (8 kB as a /dev/kmsg record); longer lines are no kernel messages. */
export const maxKernelLineLength = 8192;

/**
 * What stands before the message: a quotation mark, /dev/kmsg's "level,sequence,microseconds,flags;",
 * syslog's or journalctl's "time host kernel:", `dmesg -x`'s "kern :warn : time", dmesg's "[time]". The
 * message must begin right after it: other programs' messages may quote an Xid, and are no Xid.
 */
const prefix =
  /^(?:> )?(?:<\d{1,3}>)?(?:(\d+),(\d+),(\d+),[^;]*;)?(?:((?:[A-Z][a-z]{2} +\d{1,2} [\d:]{8}|\d{4}-\d\d-\d\d[T ][\d:.,]+\S*) \S+ kernel: )|(?:kern +: *\w+ *: (\S+) ))?(?:\[([^\]]{1,40})\] )?/;

const xidLine = /^NVRM: Xid \((?:PCI:)?([0-9a-fA-F:.]{7,16})\): (\d{1,5}), ?(.*)$/;
const busLine = /^NVRM: GPU (?:at )?(?:PCI:)?([0-9a-fA-F:.]{7,16}): (GPU has fallen off the bus.*)$/;
const sxidLine = /^nvidia-nvswitch\d+: SXid \(PCI:([0-9a-fA-F:.]{7,16})\): (\d{1,6}), ?(.*)$/;

/** Undefined for every line that is no Xid, no SXid and no lost GPU. */
export function parseKernelLine(line: string): KernelGpuEvent | undefined {
  // Most lines of a kernel log have nothing to do with GPUs: look before the regular expressions do.
  if (line.length > maxKernelLineLength || !(line.includes("NVRM: ") || line.includes("SXid"))) {
    return undefined;
  }
  const head = prefix.exec(line);
  if (head === null) return undefined;
  const rest = line.slice(head[0].length);
  const time = timeOf(head);
  const xid = xidLine.exec(rest);
  if (xid !== null) {
    const number = Number(xid[2]);
    const meaning = xidMeaning(number);
    return {
      kind: "xid",
      number,
      pciBusId: shortPci(xid[1] ?? ""),
      ...processOf(xid[3] ?? ""),
      ...time,
      name: meaning?.name,
      action: meaning?.action,
    };
  }
  const bus = busLine.exec(rest);
  if (bus !== null) {
    return {
      kind: "fallen-off-bus",
      number: undefined,
      pciBusId: shortPci(bus[1] ?? ""),
      pid: undefined,
      processName: undefined,
      message: cleanText(bus[2] ?? "", 500),
      ...time,
      name: undefined,
      action: xidMeaning(79)?.action,
    };
  }
  const sxid = sxidLine.exec(rest);
  if (sxid === null) return undefined;
  return {
    kind: "sxid",
    number: Number(sxid[2]),
    pciBusId: shortPci(sxid[1] ?? ""),
    pid: undefined,
    processName: undefined,
    message: cleanText(sxid[3] ?? "", 500),
    ...time,
    name: undefined,
    action: undefined,
  };
}

/** "pid=123, name=python3, text": pid and name are left out or '<unknown>' where the driver has none. */
function processOf(text: string): Pick<KernelGpuEvent, "pid" | "processName" | "message"> {
  const match = /^(?:pid=('?<unknown>'?|\d{1,10})(?:, |$))?(?:name=([^,]{0,64})(?:, |$))?(.*)$/s.exec(text);
  const pid = match?.[1];
  const name = match?.[2];
  return {
    pid: pid !== undefined && /^\d+$/.test(pid) ? Number(pid) : undefined,
    processName: name === undefined || name === "<unknown>" ? undefined : cleanText(name),
    message: cleanText(match?.[3] ?? text, 500),
  };
}

function timeOf(head: RegExpExecArray): Pick<KernelGpuEvent, "timeUnixMs" | "uptimeSeconds"> {
  const [, , , microseconds, syslog, decoded, bracketed] = head;
  if (microseconds !== undefined) {
    return { timeUnixMs: undefined, uptimeSeconds: Number(microseconds) / 1e6 };
  }
  const iso = (syslog ?? decoded ?? "").split(" ")[0]?.replace(",", ".") ?? "";
  if (/^\d{4}-/.test(iso)) return { timeUnixMs: parsed(iso), uptimeSeconds: undefined };
  if (bracketed === undefined) return { timeUnixMs: undefined, uptimeSeconds: undefined };
  const uptime = /^\s*(\d{1,12}\.\d{1,9})$/.exec(bracketed)?.[1];
  if (uptime !== undefined) return { timeUnixMs: undefined, uptimeSeconds: Number(uptime) };
  // dmesg -T: "Sun Feb 23 16:24:18 2025".
  return { timeUnixMs: parsed(bracketed), uptimeSeconds: undefined };
}

function parsed(text: string): number | undefined {
  const time = Date.parse(text);
  return Number.isNaN(time) ? undefined : time;
}

/** "18:00.0" and "0000:18:00.0" to "0000:18:00", which is how the driver writes Xids. */
function shortPci(text: string): string {
  const parts = text.replace(/\.[0-7]$/, "").split(":");
  if (parts.length === 2) parts.unshift("0000");
  return parts.join(":").toLowerCase();
}
