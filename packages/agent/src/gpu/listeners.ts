import { errorMessage } from "@palebluedot/shared/errors.ts";
import type { Logger } from "@palebluedot/shared/logger.ts";

/** Subscribers of one kind of news. One that throws harms neither the others nor the source. */
export interface Listeners<T> {
  add(listener: (value: T) => void): () => void;
  tell(value: T): void;
}

export function createListeners<T>(log: Logger, what: string): Listeners<T> {
  const listeners = new Set<(value: T) => void>();
  return {
    add: (listener) => {
      listeners.add(listener);
      return () => {
        listeners.delete(listener);
      };
    },
    tell: (value) => {
      for (const listener of listeners) {
        try {
          listener(value);
        } catch (error) {
          log.error({ what, error: errorMessage(error) }, "a listener failed");
        }
      }
    },
  };
}
