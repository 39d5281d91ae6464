import type { Clock } from "@palebluedot/shared/clock.ts";

export interface RateLimiter {
  /** Takes one token. Returns 0, or the seconds until one is there. */
  take(key: string): number;
  /** As take, but takes nothing. */
  peek(key: string): number;
}

interface Bucket {
  tokens: number;
  refilledAt: number;
}

/**
 * Token buckets in memory, one per key. At most `maxKeys` are kept; the one that was used longest ago
 * goes first, which at worst gives its owner a full bucket again.
 */
export function createRateLimiter(options: {
  readonly clock: Clock;
  readonly perSecond: number;
  readonly burst: number;
  readonly maxKeys?: number;
}): RateLimiter {
  const maxKeys = options.maxKeys ?? 10_000;
  // Insertion order is the order of use: every use deletes and sets again.
  const buckets = new Map<string, Bucket>();

  function refilled(key: string): Bucket {
    const now = options.clock.now();
    const bucket = buckets.get(key) ?? { tokens: options.burst, refilledAt: now };
    const elapsedSeconds = Math.max(0, now - bucket.refilledAt) / 1000;
    return {
      tokens: Math.min(options.burst, bucket.tokens + elapsedSeconds * options.perSecond),
      refilledAt: now,
    };
  }

  const waitSeconds = (bucket: Bucket): number =>
    bucket.tokens >= 1 ? 0 : (1 - bucket.tokens) / options.perSecond;

  return {
    take(key) {
      const bucket = refilled(key);
      const wait = waitSeconds(bucket);
      if (wait === 0) bucket.tokens -= 1;
      buckets.delete(key);
      buckets.set(key, bucket);
      if (buckets.size > maxKeys) {
        const oldest = buckets.keys().next();
        if (!oldest.done) buckets.delete(oldest.value);
      }
      return wait;
    },
    peek: (key) => waitSeconds(refilled(key)),
  };
}
