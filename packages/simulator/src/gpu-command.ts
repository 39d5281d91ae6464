/** `palebluedot-simulator gpu ...`: faults, processes and kernel messages of a simulated server. */
import { Argument, Option, type Command } from "commander";
import { z } from "zod";
import { PlatformError } from "@palebluedot/shared/errors.ts";
import { recoveryActions, throttleReasons, type Fault } from "./nvidia-smi/faults.ts";
import { integerOption } from "./options.ts";
import { addGpuProcess, appendXid, clearFaults, listFaults, removeGpuProcess, setFault } from "./server.ts";

const base = { gpu: z.union([z.number(), z.string()]).optional(), until_ms: z.number().optional() };
const count = z.number().int().min(0).optional();

/** A fault as it stands in the faults file. */
const faultSchema = z.discriminatedUnion("kind", [
  z.strictObject({
    ...base,
    kind: z.literal("hang"),
    ignore_sigterm: z.boolean().optional(),
    only: z.array(z.enum(["stream", "query", "xml", "other"])).optional(),
  }),
  z.strictObject({ ...base, kind: z.literal("slow"), delay_ms: z.number().min(0) }),
  z.strictObject({ ...base, kind: z.literal("driver-not-loaded") }),
  z.strictObject({ ...base, kind: z.literal("nvml-missing") }),
  z.strictObject({ ...base, kind: z.literal("version-mismatch") }),
  z.strictObject({ ...base, kind: z.literal("no-permission") }),
  z.strictObject({
    ...base,
    kind: z.literal("lost"),
    form: z.enum(["lost", "unknown-error", "fields", "absent"]).optional(),
  }),
  z.strictObject({ ...base, kind: z.literal("reset-required") }),
  z.strictObject({
    ...base,
    kind: z.literal("ecc"),
    dram_corrected: count,
    dram_uncorrected: count,
    sram_corrected: count,
    sram_uncorrected: count,
    sram_threshold_exceeded: z.boolean().optional(),
  }),
  z.strictObject({
    ...base,
    kind: z.literal("remapped-rows"),
    correctable: count,
    uncorrectable: count,
    pending: z.boolean().optional(),
    failure: z.boolean().optional(),
  }),
  z.strictObject({
    ...base,
    kind: z.literal("throttle"),
    reasons: z.array(z.enum(throttleReasons)).min(1),
    since_ms: z.number().optional(),
  }),
  z.strictObject({ ...base, kind: z.literal("overheat"), temperature_celsius: z.number() }),
  z.strictObject({ ...base, kind: z.literal("recovery-action"), action: z.enum(recoveryActions) }),
  z.strictObject({
    ...base,
    kind: z.literal("garbage"),
    form: z.enum(["invalid-utf8", "control-characters", "truncated", "long-line", "endless"]),
  }),
  z.strictObject({ ...base, kind: z.literal("dirty"), memory_mib: z.number().int().min(0) }),
  z.strictObject({
    ...base,
    kind: z.literal("exit"),
    code: z.number().int().min(0).max(255),
    message: z.string().optional(),
  }),
]);

const kinds = faultSchema.options.map((option) => option.shape.kind.value);

/** Checks a fault from outside. Throws `simulated-fault-invalid` with every complaint. */
export function parseFault(value: unknown): Fault {
  const parsed = faultSchema.safeParse(value);
  if (!parsed.success) {
    throw new PlatformError({
      code: "simulated-fault-invalid",
      kind: "invalid",
      message: parsed.error.issues
        .map((issue) => `${issue.path.join(".") || "fault"}: ${issue.message}`)
        .join("; "),
      hint: `kinds are ${kinds.join(", ")}; details are given as --set name=value`,
    });
  }
  return parsed.data;
}

/** `name=value` pairs: numbers, booleans and comma lists (for `reasons` and `only`) become what they look like. */
function details(pairs: readonly string[]): Record<string, unknown> {
  return Object.fromEntries(
    pairs.map((pair) => {
      const equals = pair.indexOf("=");
      const name = equals < 0 ? pair : pair.slice(0, equals);
      const text = equals < 0 ? "true" : pair.slice(equals + 1);
      if (name === "reasons" || name === "only") return [name, text.split(",")];
      if (text === "true" || text === "false") return [name, text === "true"];
      return [name, /^-?\d+(\.\d+)?$/.test(text) ? Number(text) : text];
    }),
  );
}

const collect = (value: string, previous: string[]): string[] => [...previous, value];

/** Adds `gpu fault`, `gpu clear`, `gpu faults`, `gpu xid`, `gpu process`. */
export function registerGpuCommand(program: Command): void {
  const command = program.command("gpu").description("break and mend the GPUs of a simulated server");
  command
    .command("fault")
    .description("put a fault in force, e.g. `gpu fault throttle --gpu 0 --set reasons=hw_slowdown`")
    .addArgument(new Argument("<kind>", "what goes wrong").choices(kinds))
    .requiredOption("--state <dir>", "directory of the server")
    .option("--gpu <gpu>", "index, UUID or PCI address (default: all, or the tool as a whole)")
    .option("--for <seconds>", "end by itself after so long", integerOption(1, 86_400))
    .option("--set <name=value>", "a detail of the fault; may be repeated", collect, [])
    .action((kind: string, options: { state: string; gpu?: string; for?: number; set: string[] }) => {
      setFault(
        options.state,
        parseFault({
          ...details(options.set),
          kind,
          ...(options.gpu === undefined ? {} : { gpu: options.gpu }),
          ...(options.for === undefined ? {} : { until_ms: Date.now() + options.for * 1000 }),
        }),
      );
    });
  command
    .command("clear")
    .description("end faults: all, of one kind, of one GPU")
    .requiredOption("--state <dir>", "directory of the server")
    .addOption(new Option("--kind <kind>", "only this kind").choices(kinds))
    .option("--gpu <gpu>", "only this GPU")
    .action((options: { state: string; kind?: Fault["kind"]; gpu?: string }) => {
      clearFaults(options.state, {
        ...(options.kind === undefined ? {} : { kind: options.kind }),
        ...(options.gpu === undefined ? {} : { gpu: options.gpu }),
      });
    });
  command
    .command("faults")
    .description("print the faults in force as JSON")
    .requiredOption("--state <dir>", "directory of the server")
    .action((options: { state: string }) => {
      process.stdout.write(`${JSON.stringify(listFaults(options.state), undefined, 2)}\n`);
    });
  command
    .command("xid")
    .description("write an Xid line to the simulated kernel log")
    .argument("<xid>", "number of the Xid", integerOption(1, 999))
    .requiredOption("--state <dir>", "directory of the server")
    .requiredOption("--gpu <gpu>", "index, UUID or PCI address")
    .option("--message <text>", "what follows the number (default: the usual text)")
    .option("--pid <pid>", "process named in the line", integerOption(1, 2 ** 22))
    .option("--process <name>", "its name")
    .addOption(new Option("--form <form>", "form of the line").choices(["kmsg", "dmesg"]).default("kmsg"))
    .action(
      (
        xid: number,
        options: {
          state: string;
          gpu: string;
          message?: string;
          pid?: number;
          process?: string;
          form: "kmsg" | "dmesg";
        },
      ) => {
        appendXid(options.state, {
          gpu: options.gpu,
          xid,
          form: options.form,
          ...(options.message === undefined ? {} : { message: options.message }),
          ...(options.pid === undefined ? {} : { pid: options.pid }),
          ...(options.process === undefined ? {} : { processName: options.process }),
        });
      },
    );
  command
    .command("process")
    .description("put a process on a GPU or take it off")
    .addArgument(new Argument("<action>", "what to do").choices(["add", "remove"]))
    .requiredOption("--state <dir>", "directory of the server")
    .requiredOption("--gpu <gpu>", "index, UUID or PCI address")
    .requiredOption("--pid <pid>", "process id", integerOption(1, 2 ** 22))
    .option("--name <name>", "process name", "python3")
    .option("--memory <mib>", "GPU memory in MiB", integerOption(0, 1_000_000), 1024)
    .option("--utilization <percent>", "load", integerOption(0, 100), 90)
    .option("--stuck", "stay on the GPU also when the process is gone")
    .action(
      (
        action: string,
        options: {
          state: string;
          gpu: string;
          pid: number;
          name: string;
          memory: number;
          utilization: number;
          stuck?: boolean;
        },
      ) => {
        if (action === "remove") removeGpuProcess(options.state, options.gpu, options.pid);
        else {
          addGpuProcess(options.state, options.gpu, {
            pid: options.pid,
            name: options.name,
            memoryMib: options.memory,
            utilization: options.utilization,
            stuck: options.stuck ?? false,
          });
        }
      },
    );
}
