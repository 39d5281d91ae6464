/** `palebluedot-simulator engine`. */
import type { Command } from "commander";

/** Adds `engine`, which runs until SIGTERM or SIGINT; containers run on. */
export function registerEngineCommand(program: Command): void {
  program
    .command("engine")
    .description("run the simulated container engine of a simulated server")
    .requiredOption("--state <dir>", "directory of the server")
    .requiredOption("--socket <path>", "unix socket to listen on")
    .action(async (options: { state: string; socket: string }) => {
      const { startEngine } = await import("./engine.ts");
      const engine = await startEngine({ stateDir: options.state, socketPath: options.socket });
      process.stdout.write(`${JSON.stringify({ docker_host: engine.dockerHost })}\n`);
      await new Promise<void>((resolve) => {
        for (const signal of ["SIGTERM", "SIGINT"] as const) process.once(signal, () => resolve());
      });
      await engine.stop();
    });
}
