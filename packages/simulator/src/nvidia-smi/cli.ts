/**
 * The simulated `nvidia-smi`: arguments in, text and exit code out, like the real tool. Reads the state of a
 * simulated server from the directory in PALEBLUEDOT_SIM_STATE. Started by `bin/nvidia-smi`.
 */
import { existsSync } from "node:fs";
import { assertNever } from "@palebluedot/shared/errors.ts";
import { parseArguments, type Arguments } from "./arguments.ts";
import { cell, findField, type FieldContext } from "./fields.ts";
import { findFault, readFaults, type Fault } from "./faults.ts";
import { driverGenerations, models, type DriverGeneration } from "./models.ts";
import { computeAppFields, retiredPageFields, type RowField } from "./processes.ts";
import { readGpu, readLiveState, type GpuReading } from "./readings.ts";
import { readServer, type GpuIdentity, type ServerDescription } from "./state.ts";
import * as text from "./text.ts";

/** Ends the command with a text on standard output and an exit code of the real tool. */
class Exit extends Error {
  readonly code: number;
  readonly output: string;
  constructor(code: number, output: string) {
    super(output);
    this.code = code;
    this.output = output;
  }
}

interface Look {
  readonly atMs: number;
  readonly readings: readonly GpuReading[];
  readonly attached: number;
  /** Printed after the readings; then the command ends with the code. */
  readonly failure: { readonly code: number; readonly output: string } | undefined;
}

const busId = (gpu: GpuIdentity): string => gpu.pciBusId.slice(4);

function toolFailure(faults: readonly Fault[], driver: DriverGeneration): void {
  if (findFault(faults, "nvml-missing")) {
    throw new Exit(
      12,
      "NVIDIA-SMI couldn't find libnvidia-ml.so library in your system. Please make sure that the NVIDIA Display Driver is properly installed and present in your system.\nPlease also try adding directory that contains libnvidia-ml.so to your system PATH.\n",
    );
  }
  if (findFault(faults, "driver-not-loaded")) {
    throw new Exit(
      9,
      "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver. Make sure that the latest NVIDIA driver is installed and running.\n\n",
    );
  }
  if (findFault(faults, "version-mismatch")) {
    const nvml = driver.version.split(".").slice(0, 2).join(".");
    throw new Exit(
      18,
      `Failed to initialize NVML: Driver/library version mismatch\nNVML library version: ${nvml}\n`,
    );
  }
  if (findFault(faults, "no-permission")) {
    throw new Exit(4, "Failed to initialize NVML: Insufficient Permissions\n");
  }
  const exit = findFault(faults, "exit");
  if (exit) throw new Exit(exit.code, exit.message === undefined ? "" : `${exit.message}\n`);
}

function selects(selector: string, gpu: GpuIdentity): boolean {
  const wanted = selector.toLowerCase();
  const long = gpu.pciBusId.toLowerCase();
  return (
    wanted === String(gpu.index) ||
    selector === gpu.uuid ||
    selector === gpu.serial ||
    wanted === long ||
    wanted === long.slice(4) ||
    wanted === long.slice(9)
  );
}

function look(dir: string, server: ServerDescription, selectors: readonly string[]): Look {
  const atMs = Date.now();
  const driver = driverOf(server);
  const faults = readFaults(dir, atMs);
  toolFailure(faults, driver);
  const state = readLiveState(dir, server, atMs);
  const lostForm = (gpu: GpuIdentity): string | undefined => {
    const fault = findFault(faults, "lost", gpu);
    return fault ? (fault.form ?? "lost") : undefined;
  };
  const present = server.gpus.filter((gpu) => lostForm(gpu) !== "absent");
  const chosen =
    selectors.length === 0
      ? present
      : present.filter((gpu) => selectors.some((selector) => selects(selector, gpu)));
  if (chosen.length === 0) throw new Exit(6, "No devices were found\n");
  const readings: GpuReading[] = [];
  let failure: Look["failure"];
  for (const gpu of chosen) {
    const form = lostForm(gpu);
    if (form === "lost" || form === "unknown-error") {
      failure =
        form === "lost"
          ? {
              code: 15,
              output: `Unable to determine the device handle for GPU ${busId(gpu)}: GPU is lost.  Reboot the system to recover this GPU\n`,
            }
          : {
              code: 255,
              output: `Unable to determine the device handle for GPU${busId(gpu)}: Unknown Error\n`,
            };
      break;
    }
    readings.push(readGpu(server, state, faults, gpu, atMs));
  }
  return { atMs, readings, attached: present.length, failure };
}

function driverOf(server: ServerDescription): DriverGeneration {
  const driver = driverGenerations.find((generation) => generation.major === server.driver);
  if (!driver) throw new Error(`no driver generation ${server.driver}`);
  return driver;
}

function queryGpu(server: ServerDescription, args: Arguments, now: Look): string {
  const driver = driverOf(server);
  const context: FieldContext = { driver, count: now.attached };
  const fields = args.fields.map((name) => {
    const field = findField(driver, name);
    if (!field) throw new Exit(2, `Field "${name}" is not a valid field to query.\n\n`);
    return field;
  });
  const head = args.header
    ? [fields.map((f) => (args.units && f.unit !== undefined ? `${f.name} [${f.unit}]` : f.name)).join(", ")]
    : [];
  const rows = now.readings.map((reading) =>
    fields.map((field) => cell(field, reading, context, args.units)).join(", "),
  );
  return `${[...head, ...rows].join("\n")}\n`;
}

function queryRows<Row>(
  fields: readonly RowField<Row>[],
  args: Arguments,
  readings: readonly GpuReading[],
  rowsOf: (reading: GpuReading) => readonly Row[],
): string {
  const chosen = args.fields.map((name) => {
    const field = fields.find((candidate) => candidate.name === name || candidate.aliases.includes(name));
    if (!field) throw new Exit(2, `Field "${name}" is not a valid field to query.\n\n`);
    return field;
  });
  const lines = args.header
    ? [chosen.map((f) => (args.units && f.unit !== undefined ? `${f.name} [${f.unit}]` : f.name)).join(", ")]
    : [];
  for (const reading of readings) {
    for (const row of rowsOf(reading)) {
      lines.push(
        chosen
          .map((field) => {
            const value = String(field.value(reading, row));
            return args.units && field.unit !== undefined ? `${value} ${field.unit}` : value;
          })
          .join(", "),
      );
    }
  }
  return lines.length === 0 ? "" : `${lines.join("\n")}\n`;
}

function answer(dir: string, server: ServerDescription, args: Arguments, now: Look): string {
  const driver = driverOf(server);
  switch (args.command) {
    case "query-gpu":
      return queryGpu(server, args, now);
    case "query-compute-apps":
      return queryRows(computeAppFields, args, now.readings, (reading) => reading.processes);
    case "query-retired-pages":
      return queryRows(retiredPageFields, args, now.readings, () => ["Single Bit ECC", "Double Bit ECC"]);
    case "xml":
      return text.xmlDocument(now.readings, driver, now.attached, now.atMs);
    case "plain":
      return text.plainDocument(now.readings, driver, now.attached, now.atMs);
    case "list":
      return text.listGpus(now.readings);
    case "topology":
      return text.topologyMatrix(server, models[server.model]);
    case "table":
      return text.table(now.readings, driver, now.atMs);
    case "mig":
      throw new Exit(6, "No MIG-enabled devices found.\n");
    case "version":
      return text.versionText(driver);
    case "help-query-gpu":
      return text.helpQueryGpu(driver);
    case "help":
      return `NVIDIA System Management Interface -- v${driver.version}\n`;
    default:
      return assertNever(args.command, "command");
  }
}

function spoil(output: string, faults: readonly Fault[]): Uint8Array | string {
  const form = findFault(faults, "garbage")?.form;
  switch (form) {
    case undefined:
      return output;
    case "invalid-utf8":
      return Buffer.concat([
        Buffer.from([0xff, 0xfe, 0xc3, 0x28, 0x0a]),
        Buffer.from(output.replaceAll("NVIDIA", "\u0001NV")),
        Buffer.from([0xf0, 0x28, 0x8c, 0xbc]),
      ]);
    case "control-characters":
      return output.replaceAll("NVIDIA", "NV\u0000\u001B[31mID\u0007IA").replaceAll(", ", ",\b ");
    case "truncated":
      return output.slice(0, Math.floor(output.length / 2));
    case "long-line":
      return `${"x".repeat(4 << 20)}\n${output}`;
    case "endless":
      return `${output}${"garbage ".repeat(1 << 20)}`;
    default:
      return assertNever(form, "form of garbage");
  }
}

function hangs(dir: string, args: Arguments): Extract<Fault, { kind: "hang" }> | undefined {
  const fault = findFault(readFaults(dir, Date.now()), "hang");
  if (!fault) return undefined;
  const kind =
    args.command === "query-gpu"
      ? args.intervalMs === undefined
        ? "query"
        : "stream"
      : args.command === "xml"
        ? "xml"
        : "other";
  return fault.only === undefined || fault.only.includes(kind) ? fault : undefined;
}

/** Never answers. Ends by a signal, or with the state directory, so that a test leaves nothing behind. */
function hang(dir: string, ignoreSigterm: boolean): Promise<never> {
  if (ignoreSigterm) {
    for (const signal of ["SIGTERM", "SIGINT", "SIGHUP"] as const) process.on(signal, () => undefined);
  }
  return new Promise(() => {
    setInterval(() => {
      if (!existsSync(dir)) process.exit(1);
    }, 500);
  });
}

const sleep = (ms: number): Promise<void> => new Promise((resolve) => setTimeout(resolve, ms));

function write(output: Uint8Array | string): Promise<void> {
  return new Promise((resolve, reject) => {
    process.stdout.write(output, (error) => (error ? reject(error) : resolve()));
  });
}

/** Runs one command line and resolves with the exit code. */
export async function run(argv: readonly string[], env: NodeJS.ProcessEnv): Promise<number> {
  const dir = env["PALEBLUEDOT_SIM_STATE"];
  if (dir === undefined || dir === "") {
    process.stderr.write(
      "PALEBLUEDOT_SIM_STATE names no state directory; make one with `palebluedot-simulator server create`\n",
    );
    return 255;
  }
  try {
    const parsed = parseArguments(argv);
    if (!parsed.ok) throw new Exit(2, parsed.message);
    const args = parsed.arguments;
    const server = readServer(dir);
    if (args.command === "version" || args.command === "help" || args.command === "help-query-gpu") {
      await write(
        answer(dir, server, args, { atMs: Date.now(), readings: [], attached: 0, failure: undefined }),
      );
      return 0;
    }
    for (let first = true; ; first = false) {
      const stuck = hangs(dir, args);
      if (stuck) await hang(dir, stuck.ignore_sigterm ?? false);
      const startedMs = Date.now();
      const faults = readFaults(dir, startedMs);
      const slow = findFault(faults, "slow");
      if (slow) await sleep(slow.delay_ms);
      const now = look(dir, server, args.selectors);
      // A failure before the first row leaves only its text, as the tool stops while it enumerates.
      if (now.readings.length > 0 || now.failure === undefined) {
        const output = answer(
          dir,
          server,
          first ? args : { ...args, header: args.repeatHeader && args.header },
          now,
        );
        await write(spoil(output, faults));
      }
      if (now.failure) throw new Exit(now.failure.code, now.failure.output);
      if (args.intervalMs === undefined) return 0;
      await sleep(Math.max(1, args.intervalMs - (Date.now() - startedMs)));
      if (!existsSync(dir)) return 255;
    }
  } catch (error) {
    if (error instanceof Exit) {
      await write(error.output);
      return error.code;
    }
    process.stderr.write(`simulated nvidia-smi: ${error instanceof Error ? error.message : String(error)}\n`);
    return 255;
  }
}
