/** `palebluedot-simulator server ...`. */
import { Option, type Command } from "commander";
import { driverGenerations, modelNames, type ModelName } from "./nvidia-smi/models.ts";
import { integerOption } from "./options.ts";
import { createSimulatedServer, openSimulatedServer, type SimulatedServer } from "./server.ts";

function print(server: SimulatedServer): void {
  process.stdout.write(
    `${JSON.stringify({ state_dir: server.stateDir, identity: server.identity, gpus: server.gpus, env: server.env }, undefined, 2)}\n`,
  );
}

/** Adds `server create` and `server show`. */
export function registerServerCommand(program: Command): void {
  const command = program.command("server").description("make and show simulated servers");
  command
    .command("create")
    .description(
      "make the state directory of one simulated server; prints its identity and environment as JSON",
    )
    .requiredOption("--state <dir>", "directory to create")
    .addOption(new Option("--model <model>", "GPU model").choices([...modelNames]).default("h100"))
    .option("--count <n>", "number of GPUs", integerOption(1, 8), 8)
    .addOption(
      new Option("--driver <major>", "driver generation")
        .choices(driverGenerations.map((generation) => String(generation.major)))
        .default("580"),
    )
    .option(
      "--seed <n>",
      "everything that identifies the server follows from it",
      integerOption(0, 2 ** 31),
      1,
    )
    .option("--hostname <name>", "host name (default: from model and seed)")
    .option(
      "--speed <factor>",
      "how many times faster than real time load and heat follow",
      integerOption(1, 10_000),
      1,
    )
    .option("--sysfs", "also write a small sysfs tree")
    .action(
      (options: {
        state: string;
        model: ModelName;
        count: number;
        driver: string;
        seed: number;
        hostname?: string;
        speed: number;
        sysfs?: boolean;
      }) => {
        print(
          createSimulatedServer({
            dir: options.state,
            model: options.model,
            count: options.count,
            driver: Number(options.driver),
            seed: options.seed,
            speed: options.speed,
            ...(options.hostname === undefined ? {} : { hostname: options.hostname }),
            ...(options.sysfs === undefined ? {} : { sysfs: options.sysfs }),
          }),
        );
      },
    );
  command
    .command("show")
    .description("print identity and environment of a simulated server as JSON")
    .requiredOption("--state <dir>", "directory of the server")
    .action((options: { state: string }) => print(openSimulatedServer(options.state)));
}
