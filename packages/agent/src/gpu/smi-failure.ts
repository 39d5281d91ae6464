import type { SmiResult } from "./smi-runner.ts";
import { cleanText } from "./values.ts";

export interface SmiFailure {
  /** Stable kebab-case code, used as the condition's reason. */
  readonly reason: string;
  readonly message: string;
  /** Whose fault: the tool's own, or the driver's behind it. */
  readonly component: "nvidia-smi" | "gpu-driver";
}

/** nvidia-smi's documented exit codes, under "RETURN VALUE" of its manual page. */
const exitReasons: ReadonlyMap<number, readonly [reason: string, component: SmiFailure["component"]]> =
  new Map([
    [2, ["invalid-argument", "nvidia-smi"]],
    [3, ["operation-unavailable", "gpu-driver"]],
    [4, ["permission-denied", "nvidia-smi"]],
    [6, ["query-failed", "gpu-driver"]],
    [8, ["power-cables-missing", "gpu-driver"]],
    [9, ["driver-not-loaded", "gpu-driver"]],
    [10, ["interrupt-problem", "gpu-driver"]],
    [12, ["nvml-missing", "gpu-driver"]],
    [13, ["nvml-function-missing", "gpu-driver"]],
    [14, ["inforom-corrupt", "gpu-driver"]],
    [15, ["gpu-lost", "gpu-driver"]],
    [18, ["driver-library-mismatch", "gpu-driver"]],
  ]);

/** Why a run brought nothing; undefined when it did. The text outweighs the code: drivers differ in codes. */
export function failureOf(result: SmiResult): SmiFailure | undefined {
  switch (result.kind) {
    case "ok":
      return undefined;
    case "missing":
      return {
        reason: "nvidia-smi-missing",
        component: "nvidia-smi",
        message: `nvidia-smi cannot be started: ${result.message}`,
      };
    case "timeout":
      return {
        reason: "unresponsive",
        component: "nvidia-smi",
        message: `nvidia-smi did not answer within ${String(Math.round(result.afterMs / 100) / 10)} s`,
      };
    case "stuck":
      return {
        reason: "unresponsive",
        component: "nvidia-smi",
        message: `an nvidia-smi (pid ${String(result.pid)}) hangs and cannot be killed; no second one is started`,
      };
    case "failed":
      break;
  }
  const words = cleanText(`${result.stdout} ${result.stderr}`.trim(), 500);
  const [reason, component] = reasonOf(result.exitCode, words);
  const code = result.exitCode === undefined ? "a signal" : `exit code ${String(result.exitCode)}`;
  return { reason, component, message: `nvidia-smi ended with ${code}: ${words || "no message"}` };
}

function reasonOf(exitCode: number | undefined, words: string): readonly [string, SmiFailure["component"]] {
  if (/no devices were found/i.test(words)) return ["no-devices", "gpu-driver"];
  if (/driver\/library version mismatch/i.test(words)) return ["driver-library-mismatch", "gpu-driver"];
  if (/couldn't communicate with the nvidia driver/i.test(words)) return ["driver-not-loaded", "gpu-driver"];
  if (/gpu is lost|unable to determine the device handle/i.test(words)) return ["gpu-lost", "gpu-driver"];
  return (exitCode === undefined ? undefined : exitReasons.get(exitCode)) ?? ["died", "nvidia-smi"];
}

/** PCI addresses of GPUs that nvidia-smi says it cannot open. */
export function unreachableGpus(text: string): string[] {
  return [
    ...text.matchAll(
      /Unable to determine the device handle for (?:GPU|gpu)\s?([0-9a-fA-F]{4,8}:[0-9a-fA-F]{2}:[0-9a-fA-F]{2}(?:\.[0-7])?)/g,
    ),
  ]
    .slice(0, 64)
    .map((match) => match[1] ?? "");
}

/** The field that an older driver does not know, from: Field "x.y" is not a valid field to query. */
export function rejectedField(text: string): string | undefined {
  return /Field "([\w.]{1,100})" is not a valid field to query/i.exec(text)?.[1];
}

/** Kinds and process ids of children that were killed and are still there, for a condition. */
export function stuckMessage(stuck: readonly (readonly [string, number])[]): string {
  const list = stuck.map(([kind, pid]) => `${kind} (pid ${String(pid)})`).join(", ");
  return `a killed nvidia-smi is still there: ${list}`;
}
