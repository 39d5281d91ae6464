import { errorMessage } from "@palebluedot/shared/errors.ts";
import { failureOf, unreachableGpus, type SmiFailure } from "./smi-failure.ts";
import type { SmiRunner } from "./smi-runner.ts";
import { parseSmiXml, type SmiDocument } from "./xml.ts";

export interface SmiLook extends SmiDocument {
  /** False when nvidia-smi ended with an error: GPUs that are missing here need not be gone. */
  readonly complete: boolean;
  /** PCI addresses of GPUs that nvidia-smi says it cannot open. */
  readonly unreachable: readonly string[];
}

/**
 * One `nvidia-smi -q -x`, of all GPUs or of those given by UUID or PCI address. A document counts also with an exit code:
 * at a lost GPU nvidia-smi stops, having described those before it.
 */
export async function readSmiDocument(
  runner: SmiRunner,
  deadlineMs: number,
  selectors: readonly string[] = [],
): Promise<SmiLook | SmiFailure> {
  const selection = selectors.length === 0 ? [] : ["-i", selectors.join(",")];
  const result = await runner.run("document", ["-q", "-x", ...selection], deadlineMs);
  if (result.kind === "ok" || result.kind === "failed") {
    const begin = result.stdout.indexOf("<nvidia_smi_log>");
    const end = result.stdout.lastIndexOf(endTag);
    const around =
      begin < 0 ? "" : `${result.stdout.slice(0, begin)}${result.stdout.slice(end + endTag.length)}`;
    const unreachable = unreachableGpus(`${around} ${result.stderr}`);
    if (begin >= 0) {
      try {
        const document = parseSmiXml(
          end < 0 ? result.stdout.slice(begin) : result.stdout.slice(begin, end + endTag.length),
        );
        const complete = result.kind === "ok" && unreachable.length === 0 && selection.length === 0;
        if (document.gpus.length > 0) return { ...document, complete, unreachable };
      } catch (error) {
        return { reason: "unreadable-output", component: "nvidia-smi", message: errorMessage(error) };
      }
    }
  }
  return (
    failureOf(result) ?? {
      reason: "no-devices",
      component: "gpu-driver",
      message: "nvidia-smi answers, but lists no GPU",
    }
  );
}

const endTag = "</nvidia_smi_log>";
