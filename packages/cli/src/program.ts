import { setTimeout as delay } from "node:timers/promises";
import { errorMessage, isPlatformError, PlatformError } from "@palebluedot/shared/errors.ts";
import { Command as Program, CommanderError, Option } from "commander";
import { createApiClient } from "./api.ts";
import type { Command, CommandContext } from "./command.ts";
import { contextFilePath, resolveContext } from "./contexts.ts";
import { exitCodeHelp, exitCodeOf, exitCodes, type ExitCode } from "./exit-codes.ts";
import { createOutput, printable, type OutputFormat, type TextSink } from "./output.ts";
import { commands, nouns } from "./registry.ts";

/** The process around the commands; a test gives its own. */
export interface ProgramIo {
  readonly stdout: TextSink;
  readonly stderr: TextSink;
  readonly env: Readonly<Record<string, string | undefined>>;
  readonly readInput: () => Promise<string>;
  readonly promptHidden: ((question: string) => Promise<string>) | undefined;
  readonly signal: AbortSignal;
  readonly now?: () => number;
  readonly sleep?: (ms: number) => Promise<void>;
}

const version = "0.1.0";

function collect(value: string, previous: readonly string[] | undefined): string[] {
  return [...(previous ?? []), value];
}

function report(error: unknown, stderr: TextSink): ExitCode {
  if (isPlatformError(error)) {
    const lines = error.message.split("\n").map((line) => printable(line));
    stderr.write(`pbd: ${lines.join("\n  ")} [${printable(error.code)}]\n`);
    if (error.hint !== undefined) stderr.write(`hint: ${printable(error.hint)}\n`);
    const requestId = error.details?.["request_id"];
    if (typeof requestId === "string") stderr.write(`request: ${printable(requestId)}\n`);
  } else {
    stderr.write(`pbd: ${printable(errorMessage(error))}\n`);
  }
  return exitCodeOf(error);
}

/** Runs one command line (without the program's own name) and returns the exit code. Never throws. */
export async function runProgram(argv: readonly string[], io: ProgramIo): Promise<ExitCode> {
  const program = new Program("pbd")
    .description("GPUs of a Palebluedot fleet: allocate, watch, operate")
    .version(version, "--version")
    .addOption(
      new Option("-o, --output <format>", "what to print").choices(["table", "json"]).default("table"),
    )
    .option("--context <name>", "use this context of pbd context list")
    .showHelpAfterError("(pbd --help lists the commands)")
    .addHelpText("after", `\n${exitCodeHelp}`);

  // Before subcommands are made: they inherit both.
  program.exitOverride().configureOutput({
    writeOut: (text) => void io.stdout.write(text),
    writeErr: (text) => void io.stderr.write(text),
  });

  function contextOf(): CommandContext {
    const { output, context: contextName } = program.opts<{ output: OutputFormat; context?: string }>();
    const contextFile = contextFilePath(io.env);
    return {
      output: createOutput(output, io.stdout, io.stderr),
      env: io.env,
      contextFile,
      contextName,
      api: async () =>
        createApiClient(
          await resolveContext(io.env, contextFile, contextName),
          io.sleep === undefined ? {} : { sleep: io.sleep },
        ),
      readInput: io.readInput,
      promptHidden: io.promptHidden,
      now: io.now ?? Date.now,
      sleep: io.sleep ?? ((ms) => delay(ms, undefined, { signal: io.signal }).catch(() => undefined)),
      signal: io.signal,
    };
  }

  const groups = new Map<string, Program>();
  for (const command of commands) addCommand(command);

  function addCommand(command: Command): void {
    const [first, second] = command.path;
    let parent = program;
    if (second !== undefined) {
      parent = groups.get(first) ?? program.command(first).description(nouns[first] ?? "");
      groups.set(first, parent);
    }
    const made = parent.command(second ?? first).description(command.description);
    for (const argument of command.arguments ?? []) {
      made.argument(argument.optional ? `[${argument.name}]` : `<${argument.name}>`, argument.description);
    }
    for (const option of command.options ?? []) {
      if (option.repeatable) made.option(option.flags, option.description, collect);
      else made.option(option.flags, option.description);
    }
    if (command.examples !== undefined) {
      made.addHelpText("after", `\nExamples:\n${command.examples.map((line) => `  ${line}`).join("\n")}`);
    }
    made.action(async () => {
      const raw: Record<string, unknown> = { ...made.opts<Record<string, unknown>>() };
      for (const [index, argument] of (command.arguments ?? []).entries()) {
        raw[argument.name.replace("...", "")] = made.processedArgs[index] as unknown;
      }
      await command.execute(contextOf(), raw);
    });
  }

  try {
    await program.parseAsync(argv, { from: "user" });
    return exitCodes.ok;
  } catch (error) {
    if (error instanceof CommanderError) return error.exitCode === 0 ? exitCodes.ok : exitCodes.usage;
    if (io.signal.aborted) return exitCodes.failure;
    return report(error, io.stderr);
  }
}

/** Input larger than this is no token and no request. */
export const maxInputBytes = 4 * 1024 * 1024;

/** Standard input to its end. Throws PlatformError `input-too-large`. */
export async function readStream(stream: AsyncIterable<Uint8Array>): Promise<string> {
  const chunks: Uint8Array[] = [];
  let bytes = 0;
  for await (const chunk of stream) {
    bytes += chunk.length;
    if (bytes > maxInputBytes) {
      throw new PlatformError({
        code: "input-too-large",
        kind: "too-large",
        message: "standard input is larger than 4 MiB",
        hint: "Is this the right file?",
      });
    }
    chunks.push(chunk);
  }
  return Buffer.concat(chunks).toString("utf8");
}
