import type { Clock } from "@palebluedot/shared/clock.ts";

/**
 * One read for all who ask: callers during a read wait for it, and callers within `maxAgeMs` of its start get
 * its answer. A failure is told to those who waited and is not kept.
 */
export function sharedRead<T>(
  clock: Pick<Clock, "now">,
  maxAgeMs: number,
  read: () => Promise<T>,
): () => Promise<T> {
  let answer: Promise<T> | undefined;
  let under = false;
  let startedMs = 0;
  return () => {
    const age = clock.now() - startedMs;
    // A clock that was set back must not keep an answer for ever.
    if (answer !== undefined && (under || (age >= 0 && age < maxAgeMs))) return answer;
    startedMs = clock.now();
    under = true;
    const mine = read().then(
      (value) => {
        under = false;
        return value;
      },
      (error: unknown) => {
        under = false;
        answer = undefined;
        throw error;
      },
    );
    answer = mine;
    return mine;
  };
}
