import { PlatformError } from "@palebluedot/shared/errors.ts";
import { z } from "zod";
import type { ApiClient } from "./api.ts";
import type { Output } from "./output.ts";

/** What a command may touch; a test gives its own. */
export interface CommandContext {
  readonly output: Output;
  readonly env: Readonly<Record<string, string | undefined>>;
  readonly contextFile: string;
  /** `--context`; undefined: the current one. */
  readonly contextName: string | undefined;
  /** Connects as the chosen context. Throws PlatformError `not-logged-in`. */
  api(): Promise<ApiClient>;
  /** Standard input to its end. */
  readInput(): Promise<string>;
  /** Asks on the terminal without showing the answer; undefined without a terminal. */
  readonly promptHidden: ((question: string) => Promise<string>) | undefined;
  now(): number;
  sleep(ms: number): Promise<void>;
  /** Aborts on Ctrl-C. */
  readonly signal: AbortSignal;
}

export interface CommandSpec<Input extends z.ZodType> {
  /** Noun, then verb; or a single word. */
  readonly path: readonly [string] | readonly [string, string];
  readonly description: string;
  readonly arguments?: readonly {
    readonly name: string;
    readonly description: string;
    readonly optional?: true;
  }[];
  /** Flags as commander writes them: "--gpus <count>", "-f, --follow". */
  readonly options?: readonly {
    readonly flags: string;
    readonly description: string;
    readonly repeatable?: true;
  }[];
  readonly examples?: readonly string[];
  /** Arguments by name and options in camelCase; text unless the flag takes no value. */
  readonly input: Input;
  readonly run: (context: CommandContext, input: z.output<Input>) => Promise<void>;
}

export interface Command extends Omit<CommandSpec<z.ZodType>, "run" | "input"> {
  execute(context: CommandContext, raw: unknown): Promise<void>;
}

/** Checks the input once, all faults together, before the command runs. */
export function defineCommand<Input extends z.ZodType>(spec: CommandSpec<Input>): Command {
  return {
    ...spec,
    async execute(context, raw) {
      const parsed = spec.input.safeParse(raw);
      if (!parsed.success) {
        throw new PlatformError({
          code: "usage",
          kind: "invalid",
          message: parsed.error.issues
            .map((issue) => `${issue.path.map(String).join(".")}: ${issue.message}`)
            .join("\n  "),
          hint: `pbd ${spec.path.join(" ")} --help tells what it takes.`,
        });
      }
      await spec.run(context, parsed.data);
    },
  };
}

/** A whole number on the command line. */
export const integerText = (minimum: number, maximum: number) =>
  z
    .string()
    .regex(/^\d{1,15}$/, "must be a whole number")
    .transform(Number)
    .pipe(z.number().min(minimum).max(maximum));

/** `--limit` of every list. */
export const limitOption = { flags: "--limit <count>", description: "at most this many (default 500)" };
export const limitInput = integerText(1, 100_000).default(500);

/** NAME=VALUE, repeated, as a record. A name given twice is a fault. */
export const assignments = z
  .array(z.string())
  .default([])
  .transform((pairs, issues) => {
    const record: Record<string, string> = {};
    for (const pair of pairs) {
      const at = pair.indexOf("=");
      const name = pair.slice(0, Math.max(0, at));
      if (name === "" || name in record) {
        issues.addIssue({
          code: "custom",
          message: `${JSON.stringify(at === -1 ? pair : name)}: write NAME=VALUE, each name once`,
        });
        continue;
      }
      record[name] = pair.slice(at + 1);
    }
    return record;
  });
