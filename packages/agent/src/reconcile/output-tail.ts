import { errorMessage } from "@palebluedot/shared/errors.ts";
import type { WorkloadContext } from "./context.ts";

/** What is kept of a container's output when it is gone. */
const outputTailBytes = 16 * 1024;
/** More lines than fit, unless they are very short. */
const tailLines = 1000;
/** An engine that does not give the output must not hold a release up. */
const readMs = 5000;

/**
 * The last 16 KiB that a container wrote, both streams as they came. Memory is bounded whatever the container
 * wrote. Undefined when it cannot be read within 5 seconds, which is logged: output is worth less than a clean
 * server. Never throws.
 */
export async function readOutputTail(
  context: Pick<WorkloadContext, "client" | "log">,
  containerId: string,
): Promise<Buffer | undefined> {
  try {
    const frames = await context.client.logs(
      containerId,
      { follow: false, tailLines, sinceUnixMs: 0, timestamps: false },
      AbortSignal.timeout(readMs),
    );
    let tail: Buffer = Buffer.alloc(0);
    for await (const { data } of frames) {
      tail = Buffer.concat([tail, data]);
      // In strides: cutting at every piece would copy all of it each time.
      if (tail.length > outputTailBytes * 4) tail = Buffer.from(tail.subarray(-outputTailBytes));
    }
    return wholeCharacters(tail);
  } catch (error) {
    context.log.warn({ containerId, reason: errorMessage(error) }, "the end of the output could not be kept");
    return undefined;
  }
}

/** The end of it, without the rest of a character that was cut in two. */
function wholeCharacters(output: Buffer): Buffer {
  if (output.length <= outputTailBytes) return output;
  let start = output.length - outputTailBytes;
  for (let skipped = 0; skipped < 3 && ((output[start] ?? 0) & 0xc0) === 0x80; skipped += 1) start += 1;
  return Buffer.from(output.subarray(start));
}
