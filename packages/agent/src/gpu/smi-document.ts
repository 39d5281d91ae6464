import { errorMessage } from "@palebluedot/shared/errors.ts";
import { failureOf, type SmiFailure } from "./smi-failure.ts";
import type { SmiRunner } from "./smi-runner.ts";
import { parseSmiXml, type SmiDocument } from "./xml.ts";

/**
 * One `nvidia-smi -q -x`. A document counts also with an exit code: with one GPU lost, nvidia-smi
 * describes the others and then fails.
 */
export async function readSmiDocument(
  runner: SmiRunner,
  deadlineMs: number,
): Promise<SmiDocument | SmiFailure> {
  const result = await runner.run("document", ["-q", "-x"], deadlineMs);
  if (result.kind === "ok" || result.kind === "failed") {
    const begin = result.stdout.indexOf("<nvidia_smi_log>");
    if (begin >= 0) {
      try {
        const document = parseSmiXml(result.stdout.slice(begin));
        if (document.gpus.length > 0) return document;
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
