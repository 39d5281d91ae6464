/** The command line of the simulated nvidia-smi. */

type Command =
  | "query-gpu"
  | "query-compute-apps"
  | "query-retired-pages"
  | "xml"
  | "plain"
  | "list"
  | "topology"
  | "table"
  | "mig"
  | "version"
  | "help"
  | "help-query-gpu";

export interface Arguments {
  readonly command: Command;
  readonly fields: readonly string[];
  readonly header: boolean;
  readonly units: boolean;
  /** The table and the documents are repeated whole; CSV prints its header once. */
  readonly repeatHeader: boolean;
  readonly selectors: readonly string[];
  /** Undefined: once. */
  readonly intervalMs: number | undefined;
  /** Of `mig`: what follows the word. */
  readonly rest: readonly string[];
}

export type Parsed =
  | { readonly ok: true; readonly arguments: Arguments }
  | { readonly ok: false; readonly message: string };

const badCombination = "Invalid combination of input arguments. Please run 'nvidia-smi -h' for help.\n\n";

const queries = {
  "--query-gpu": "query-gpu",
  "--query-compute-apps": "query-compute-apps",
  "--query-retired-pages": "query-retired-pages",
} as const;

/** Options that take a value, by every spelling. */
const valued: Readonly<Record<string, "id" | "format" | "loop" | "loop-ms" | "file" | "display">> = {
  "-i": "id",
  "--id": "id",
  "--format": "format",
  "-l": "loop",
  "--loop": "loop",
  "-lms": "loop-ms",
  "--loop-ms": "loop-ms",
};

const fail = (message: string): Parsed => ({ ok: false, message });

/** The message is what the tool prints before it exits with 2. */
export function parseArguments(argv: readonly string[]): Parsed {
  let command: Command | undefined;
  let fields: readonly string[] = [];
  let format: string | undefined;
  let selectors: readonly string[] = [];
  let intervalMs: number | undefined;
  let query = false;
  let xml = false;

  if (argv[0] === "topo" || argv[0] === "mig") {
    const rest = argv.slice(1);
    if (argv[0] === "topo" && !rest.includes("-m") && !rest.includes("--matrix")) return fail(badCombination);
    return {
      ok: true,
      arguments: {
        command: argv[0] === "topo" ? "topology" : "mig",
        fields,
        header: true,
        units: true,
        repeatHeader: true,
        selectors,
        intervalMs,
        rest,
      },
    };
  }

  for (let index = 0; index < argv.length; index++) {
    const argument = argv[index] ?? "";
    const equals = argument.indexOf("=");
    const name = equals < 0 ? argument : argument.slice(0, equals);
    const inline = equals < 0 ? undefined : argument.slice(equals + 1);
    const queried = queries[name as keyof typeof queries] as Command | undefined;
    if (queried) {
      if (inline === undefined || inline === "") return fail(badCombination);
      if (command) return fail("Only one --query-* switch can be used at a time.\n\n");
      command = queried;
      fields = inline.split(",").map((field) => field.trim());
      continue;
    }
    const option = valued[name];
    if (option) {
      const following = argv[index + 1];
      // The interval may be left out: `-l` alone repeats every 5 s, `-lms` every 1000 ms.
      const optional = option === "loop" || option === "loop-ms";
      let value = inline;
      if (value === undefined && following !== undefined && !(optional && following.startsWith("-"))) {
        value = following;
        index++;
      }
      if (option === "loop" || option === "loop-ms") {
        const number = value === undefined ? (option === "loop" ? 5 : 1000) : Number(value);
        if (!Number.isInteger(number) || number <= 0) return fail(`Invalid loop interval "${value}".\n\n`);
        intervalMs = option === "loop" ? number * 1000 : number;
      } else if (value === undefined) {
        return fail(badCombination);
      } else if (option === "id") {
        selectors = value.split(",").map((selector) => selector.trim());
      } else {
        format = value;
      }
      continue;
    }
    if (argument === "-L" || argument === "--list-gpus") command = "list";
    else if (argument === "-q" || argument === "--query") query = true;
    else if (argument === "-x" || argument === "--xml-format") xml = true;
    else if (argument === "-h" || argument === "--help") command = "help";
    else if (argument === "--version") command = "version";
    else if (argument === "--help-query-gpu") command = "help-query-gpu";
    else return fail(`Invalid combination of input arguments. Please run 'nvidia-smi -h' for help.\n\n`);
  }

  const parts = format?.split(",").map((part) => part.trim()) ?? [];
  if (fields.length > 0) {
    if (!parts.includes("csv")) return fail(`"--format=" switch is missing "csv" argument.\n\n`);
    if (query || xml) return fail(badCombination);
  } else if (format !== undefined) {
    return fail(badCombination);
  }
  const unknown = parts.find((part) => part !== "csv" && part !== "noheader" && part !== "nounits");
  if (unknown !== undefined)
    return fail(`"${unknown}" is not a valid argument for the switch "--format=".\n\n`);
  if (xml && !query) return fail(badCombination);
  command ??= query ? (xml ? "xml" : "plain") : "table";
  return {
    ok: true,
    arguments: {
      command,
      fields,
      header: !parts.includes("noheader"),
      units: !parts.includes("nounits"),
      repeatHeader: fields.length === 0,
      selectors,
      intervalMs,
      rest: [],
    },
  };
}
