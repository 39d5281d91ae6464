/** Exponential back-off with full jitter: uniform in [0, min(cap, base * 2^attempt)]. `attempt` starts at 0. */
export function fullJitterMs(
  attempt: number,
  options: { readonly baseMs: number; readonly capMs: number },
  random: () => number = Math.random,
): number {
  const ceiling = Math.min(options.capMs, options.baseMs * 2 ** Math.min(attempt, 30));
  return Math.floor(random() * ceiling);
}
