/**
 * What a simulated container does. Nothing a tenant gives is executed: a handful of commands is acted out, and
 * anything else becomes a log that ticks.
 */

export type Step =
  | { readonly kind: "echo"; readonly words: readonly string[]; readonly stderr: boolean }
  /** Infinity for "sleep infinity". */
  | { readonly kind: "sleep"; readonly seconds: number }
  | { readonly kind: "exit"; readonly code: number }
  /** true and false: the code counts when it is the last step, and ends an && chain. */
  | { readonly kind: "status"; readonly code: number }
  | { readonly kind: "env" }
  | { readonly kind: "list-gpus" };

export type Program =
  | { readonly kind: "burn" }
  | { readonly kind: "ticker"; readonly name: string }
  | { readonly kind: "script"; readonly steps: readonly Step[]; readonly forever: boolean };

const maximumSteps = 1_000;

/** Splits one simple command into words; quotes group, nothing else is special. */
function words(text: string): string[] {
  const found: string[] = [];
  for (const match of text.matchAll(/(?:"([^"]*)"|'([^']*)'|([^\s"']+))/g)) {
    found.push(match[1] ?? match[2] ?? match[3] ?? "");
  }
  return found;
}

function stepOf(command: readonly string[]): Step | undefined {
  const [name, ...rest] = command;
  switch ((name ?? "").replace(/^.*\//, "")) {
    case "echo": {
      const stderr = rest.includes(">&2") || rest.includes("1>&2");
      const text = rest.filter((word) => word !== ">&2" && word !== "1>&2" && word !== "-n" && word !== "-e");
      return { kind: "echo", words: text, stderr };
    }
    case "sleep": {
      if (rest[0] === "infinity") return { kind: "sleep", seconds: Number.POSITIVE_INFINITY };
      const match = /^(\d+(?:\.\d+)?)([smhd]?)$/.exec(rest[0] ?? "");
      if (!match) return undefined;
      const unit = { "": 1, s: 1, m: 60, h: 3_600, d: 86_400 }[match[2] ?? ""] ?? 1;
      return { kind: "sleep", seconds: Number(match[1]) * unit };
    }
    case "exit": {
      const code = Number(rest[0] ?? 0);
      return Number.isInteger(code) ? { kind: "exit", code: code & 255 } : undefined;
    }
    case "true":
    case ":":
      return { kind: "status", code: 0 };
    case "false":
      return { kind: "status", code: 1 };
    case "env":
    case "printenv":
      return rest.length === 0 ? { kind: "env" } : undefined;
    case "nvidia-smi":
      return { kind: "list-gpus" };
    default:
      return undefined;
  }
}

function script(text: string): Program | undefined {
  const loop = /^\s*while\s+(?:true|:)\s*;?\s*do\s+(.*?)\s*;?\s*done\s*;?\s*$/s.exec(text);
  const body = loop?.[1] ?? text;
  const steps: Step[] = [];
  for (const part of body.split(/;|&&|\n/)) {
    if (part.trim() === "") continue;
    const step = stepOf(words(part.trim().replace(/^exec\s+/, "")));
    if (step === undefined || steps.length >= maximumSteps) return undefined;
    steps.push(step);
  }
  if (steps.length === 0) return undefined;
  // A loop that never waits would only fill the log.
  if (loop && !steps.some((step) => step.kind === "sleep" && step.seconds > 0)) {
    steps.push({ kind: "sleep", seconds: 1 });
  }
  return { kind: "script", steps, forever: loop !== null };
}

/** What the command line of a container is acted out as. */
export function programOf(command: readonly string[]): Program {
  const [name = "", ...rest] = command;
  const base = name.replace(/^.*\//, "");
  if (base === "burn") return { kind: "burn" };
  if ((base === "sh" || base === "bash") && (rest[0] === "-c" || rest[0] === "-lc" || rest[0] === "-ec")) {
    return script(rest[1] ?? "") ?? { kind: "ticker", name: base };
  }
  const step = stepOf(command);
  return step
    ? { kind: "script", steps: [step], forever: false }
    : { kind: "ticker", name: base || "container" };
}

/** `$NAME` and `${NAME}` of the container's own environment. */
export function expand(text: string, env: Readonly<Record<string, string>>): string {
  return text.replaceAll(
    /\$(?:\{(\w+)\}|(\w+))/g,
    (_, braced: string | undefined, bare: string | undefined) => env[braced ?? bare ?? ""] ?? "",
  );
}
