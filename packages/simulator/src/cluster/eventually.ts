import { setTimeout as sleep } from "node:timers/promises";

/**
 * Polls until `look` returns something other than undefined/false, or throws with what it saw last.
 * An error thrown by `look` counts as "not yet" and is the cause when time runs out.
 */
export async function eventually<T>(
  what: string,
  look: () => Promise<T | undefined | false> | T | undefined | false,
  options: { readonly timeoutMs?: number; readonly intervalMs?: number } = {},
): Promise<T> {
  const deadline = performance.now() + (options.timeoutMs ?? 30_000);
  let last: unknown;
  for (;;) {
    try {
      const seen = await look();
      if (seen !== undefined && seen !== false) return seen;
      last = undefined;
    } catch (error) {
      last = error;
    }
    if (performance.now() > deadline) {
      throw new Error(`not within ${options.timeoutMs ?? 30_000} ms: ${what}`, { cause: last });
    }
    await sleep(options.intervalMs ?? 50);
  }
}
