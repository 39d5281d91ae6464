import {
  appendFileSync,
  mkdtempSync,
  readFileSync,
  renameSync,
  rmSync,
  truncateSync,
  writeFileSync,
} from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { systemClock, type Clock } from "@palebluedot/shared/clock.ts";
import { createLogger } from "@palebluedot/shared/logger.ts";
import { recordingsDir } from "@palebluedot/shared/testing/recordings.ts";
import { createKernelLogFollower, type KernelLogFollower } from "./kernel-log-follower.ts";
import { parseKernelLine, type KernelGpuEvent } from "./kernel-log.ts";
import { createXidEvents } from "./xid-events.ts";

describe("parseKernelLine", () => {
  const line = "NVRM: Xid (PCI:0000:18:00): 79, pid=1234, name=python3, GPU has fallen off the bus.";

  it.each([
    ["bare", "", undefined, undefined],
    ["/dev/kmsg", "4,3965,206764310,-;", undefined, 206.76431],
    ["dmesg", "[171167.620236] ", undefined, 171167.620236],
    ["dmesg -T", "[Sun Feb 23 16:24:18 2025] ", Date.parse("2025-02-23 16:24:18"), undefined],
    [
      "dmesg -x",
      "kern  :warn  : 2025-01-21T04:41:44,283390+00:00 ",
      Date.parse("2025-01-21T04:41:44.283Z"),
      undefined,
    ],
    [
      "journalctl",
      "2025-01-21T04:41:44+00:00 node-7 kernel: ",
      Date.parse("2025-01-21T04:41:44Z"),
      undefined,
    ],
    ["syslog", "Feb 23 16:24:18 node-7 kernel: [171167.620236] ", undefined, 171167.620236],
  ])("reads an Xid in the form of %s", (_, head, timeUnixMs, uptimeSeconds) => {
    expect(parseKernelLine(`${head}${line}`)).toEqual({
      kind: "xid",
      number: 79,
      pciBusId: "0000:18:00",
      pid: 1234,
      processName: "python3",
      message: "GPU has fallen off the bus.",
      timeUnixMs,
      uptimeSeconds,
      name: "GPU has fallen off the bus",
      action: "RESTART_BM",
    });
  });

  it("takes '<unknown>' for no process, and a line without process as it is", () => {
    const unknown = parseKernelLine(
      "NVRM: Xid (PCI:0000:05:00): 13, pid='<unknown>', name=<unknown>, Graphics",
    );
    expect(unknown).toMatchObject({ number: 13, message: "Graphics" });
    expect(unknown?.pid).toBeUndefined();
    expect(unknown?.processName).toBeUndefined();
    expect(
      parseKernelLine("NVRM: Xid (PCI:0008:01:00): 149, NETIR_LINK_EVT Fatal XC0 i0 Link 08 (0x004505c6)"),
    ).toMatchObject({ number: 149, message: "NETIR_LINK_EVT Fatal XC0 i0 Link 08 (0x004505c6)" });
  });

  it("reads a GPU that fell off the bus without an Xid, and an SXid", () => {
    expect(parseKernelLine("NVRM: GPU 18:00.0: GPU has fallen off the bus.")).toMatchObject({
      kind: "fallen-off-bus",
      pciBusId: "0000:18:00",
    });
    expect(
      parseKernelLine("nvidia-nvswitch3: SXid (PCI:0000:05:00.0): 12028, Non-fatal, Link 32 egress"),
    ).toMatchObject({ kind: "sxid", number: 12028, pciBusId: "0000:05:00" });
  });

  it.each([
    'kernel: audit: name="NVRM: Xid (PCI:0000:18:00): 79, GPU has fallen off the bus."',
    "some tenant says NVRM: Xid (PCI:0000:18:00): 79, boo",
    "NVRM: GPU 0000:91:00.0: GPU serial number is 1.",
    "NVRM: Xid (PCI:0000:18:00): many, boo",
    `NVRM: Xid (PCI:0000:18:00): 79, ${"x".repeat(9000)}`,
    "",
  ])("takes %j for no event", (text) => {
    expect(parseKernelLine(text)).toBeUndefined();
  });

  it("passes no control characters on", () => {
    const event = parseKernelLine("NVRM: Xid (PCI:0000:18:00): 31, pid=1, name=a\u001B[2Jb, c\u0000d\uFFFD");
    expect(event?.processName).toBe("ab");
    expect(event?.message).toBe("c\uFFFDd\uFFFD");
  });
});

describe("createXidEvents", () => {
  it("tells the first of a burst and counts the others into the next", () => {
    let now = 1_000_000;
    const clock: Clock = { ...systemClock, now: () => now };
    const events = createXidEvents(clock, () => 0);
    const xid = parseKernelLine("[10.5] NVRM: Xid (PCI:0000:18:00): 13, pid=1, name=a, boo");
    if (xid === undefined) throw new Error("no Xid");
    expect(events.from(xid, "GPU-a")).toMatchObject({ type: "gpu.xid", timeUnixMs: 10_500 });
    for (let repeat = 0; repeat < 500; repeat += 1) expect(events.from(xid, "GPU-a")).toBeUndefined();
    now += 61_000;
    expect(events.from(xid, "GPU-a")?.data).toMatchObject({ repeated: 500 });
  });
});

function xid(number: number): string {
  return `4,1,1000000,-;NVRM: Xid (PCI:0000:18:00): ${String(number)}, boo\n`;
}

describe("the follower", () => {
  let dir: string;
  let file: string;
  let events: KernelGpuEvent[];
  let follower: KernelLogFollower | undefined;
  let failures: (string | undefined)[];
  beforeEach(() => {
    dir = mkdtempSync(join(tmpdir(), "pbd-kmsg-"));
    file = join(dir, "kernel.log");
    events = [];
    failures = [];
  });
  afterEach(async () => {
    await follower?.stop();
    rmSync(dir, { recursive: true, force: true });
  });

  async function follow(): Promise<void> {
    await follower?.stop();
    const before = failures.length;
    follower = createKernelLogFollower({
      path: file,
      stateDir: join(dir, "state"),
      bootId: "boot-1",
      clock: systemClock,
      log: createLogger({ name: "test", level: "silent" }),
      pollMs: 10,
      onEvent: (event) => events.push(event),
      onFailure: (message) => failures.push(message),
    });
    follower.start();
    await until(() => failures.length > before);
  }
  async function until(holds: () => boolean): Promise<void> {
    const deadline = Date.now() + 10_000;
    while (!holds()) {
      if (Date.now() > deadline) throw new Error(`not within 10 s; ${JSON.stringify(numbers())}`);
      await new Promise((resolve) => setTimeout(resolve, 5));
    }
  }
  const numbers = (): (number | undefined)[] => events.map((event) => event.number);

  it("begins at the end of an old log and tells what is appended, also in pieces", async () => {
    writeFileSync(file, xid(1).repeat(50));
    await follow();
    const line = xid(79);
    appendFileSync(file, line.slice(0, 30));
    appendFileSync(file, line.slice(30) + xid(31));
    await until(() => events.length >= 2);
    expect(numbers()).toEqual([79, 31]);
  });

  it("tells once, over a restart of the agent, what came meanwhile", async () => {
    writeFileSync(file, xid(1));
    await follow();
    appendFileSync(file, xid(2));
    await until(() => events.length === 1);
    await follower?.stop();
    appendFileSync(file, xid(3));
    await follow();
    await until(() => events.length >= 2);
    await follow();
    appendFileSync(file, xid(4));
    await until(() => events.length >= 3);
    expect(numbers()).toEqual([2, 3, 4]);
  });

  it("follows a rotation and a truncation", async () => {
    writeFileSync(file, xid(1));
    await follow();
    renameSync(file, `${file}.1`);
    writeFileSync(file, `${xid(2)}${xid(3)}`);
    await until(() => events.length >= 2);
    truncateSync(file, 0);
    appendFileSync(file, xid(4));
    await until(() => events.length >= 3);
    expect(numbers()).toEqual([2, 3, 4]);
  });

  it("tells the first line of a log that was not there yet, and says that it was missing", async () => {
    await follow();
    expect(failures[0]).toContain("ENOENT");
    writeFileSync(file, xid(48));
    await until(() => events.length === 1);
    expect(numbers()).toEqual([48]);
    // The reader says that it can read again once it has read.
    await until(() => failures.at(-1) === undefined);
  });

  it("survives bytes that are no text, and lines that never end", async () => {
    writeFileSync(file, "");
    await follow();
    appendFileSync(file, Buffer.concat([Buffer.alloc(300_000, 0xff), Buffer.from("\n")]));
    appendFileSync(file, xid(64));
    await until(() => events.length === 1);
    expect(numbers()).toEqual([64]);
  });
});

const recordings = recordingsDir();

function parsed(name: string): KernelGpuEvent[] {
  return readFileSync(join(recordings ?? "", "gpu/kernel-log", name), "utf8")
    .split("\n")
    .map(parseKernelLine)
    .filter((event) => event !== undefined);
}

describe.skipIf(recordings === undefined)("recorded kernel logs", () => {
  it("hold the five time-outs of one GSP", () => {
    const events = parsed("dmesg-with-xid-119.log");
    expect(events.map((event) => [event.number, event.pciBusId])).toEqual(
      Array.from({ length: 5 }, () => [119, "0000:9b:00"]),
    );
    expect(events[0]).toMatchObject({ pid: 2024380, processName: "nvidia-smi", action: "RESET_GPU" });
  });

  it("hold every line of the collection that is an event", () => {
    const events = parsed("xid-sxid-lines.txt");
    expect(events).toHaveLength(70);
    expect(events.filter((event) => event.kind === "sxid").length).toBe(11);
    expect(events.filter((event) => event.kind === "fallen-off-bus").length).toBe(1);
  });

  it("hold none where there is none", () => {
    expect(parsed("kmsg.1.log")).toEqual([]);
  });
});
