import type { Command } from "commander";

/** Adds `engine`. */
export function registerEngineCommand(program: Command): void {
  program.command("engine");
}
