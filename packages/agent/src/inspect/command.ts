import type { Command } from "commander";
import { isPlatformError } from "@palebluedot/shared/errors.ts";
import { runInspect, type InspectArguments } from "./inspect.ts";

/** `inspect`: result on standard output, complaints on standard error, exit code 2 for unusable input. */
export function registerInspectCommand(program: Command): void {
  program
    .command("inspect")
    .description("print as JSON what the agent would report from recorded documents")
    .option("--nvidia-smi-xml <file>", "output of `nvidia-smi -q -x`")
    .option("--nvidia-smi-csv <file>", "output of `nvidia-smi --query-gpu=... --format=csv`")
    .option("--fields <list>", "the fields of the CSV file, in order")
    .option("--kernel-log <file>", "dmesg, journalctl -k, syslog or /dev/kmsg")
    .action(async (args: InspectArguments) => {
      try {
        process.stdout.write(`${JSON.stringify(await runInspect(args), undefined, 2)}\n`);
      } catch (error) {
        if (!isPlatformError(error)) throw error;
        const hint = error.hint === undefined ? "" : `\n${error.hint}`;
        process.stderr.write(`${error.code}: ${error.message}${hint}\n`);
        process.exitCode = 2;
      }
    });
}
