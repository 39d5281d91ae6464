/** `palebluedot-simulator`: makes simulated GPU servers, breaks them, runs their container engine, and holds fleets. */
import { Command, CommanderError } from "commander";
import { errorMessage, isPlatformError } from "@palebluedot/shared/errors.ts";
import { registerEngineCommand } from "./engine/command.ts";
import { registerFleetCommand } from "./fleet/command.ts";
import { registerGpuCommand } from "./gpu-command.ts";
import { registerServerCommand } from "./server-command.ts";

const program = new Command("palebluedot-simulator")
  .description("simulated GPU servers: a stateful nvidia-smi and a container engine, as real processes")
  .showHelpAfterError()
  .exitOverride();

registerServerCommand(program);
registerGpuCommand(program);
registerEngineCommand(program);
registerFleetCommand(program);

try {
  await program.parseAsync();
} catch (error) {
  if (error instanceof CommanderError) {
    process.exitCode = error.exitCode === 0 ? 0 : 2;
  } else {
    const hint = isPlatformError(error) && error.hint !== undefined ? `\n${error.hint}` : "";
    const code = isPlatformError(error) ? ` [${error.code}]` : "";
    process.stderr.write(`error${code}: ${errorMessage(error)}${hint}\n`);
    process.exitCode = 1;
  }
}
