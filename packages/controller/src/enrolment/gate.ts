import { PlatformError } from "@palebluedot/shared/errors.ts";

/** At most so many at once, at most so many waiting. */
export class Gate {
  readonly #concurrent: number;
  readonly #maxWaiting: number;
  #running = 0;
  readonly #waiting: (() => void)[] = [];

  constructor(concurrent: number, maxWaiting: number) {
    this.#concurrent = concurrent;
    this.#maxWaiting = maxWaiting;
  }

  async run<T>(work: () => Promise<T>): Promise<T> {
    if (this.#running >= this.#concurrent) {
      if (this.#waiting.length >= this.#maxWaiting) {
        throw new PlatformError({
          code: "controller-overloaded",
          kind: "unavailable",
          message: "too many requests wait already",
          hint: "It is tried again by itself.",
        });
      }
      await new Promise<void>((resolve) => this.#waiting.push(resolve));
    } else {
      this.#running += 1;
    }
    try {
      return await work();
    } finally {
      const next = this.#waiting.shift();
      // The place is handed over, so `running` stays.
      if (next === undefined) this.#running -= 1;
      else next();
    }
  }
}
