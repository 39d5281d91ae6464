import { randomBytes } from "node:crypto";
import { rm, stat, statfs } from "node:fs/promises";
import { join } from "node:path";
import type { Clock } from "@palebluedot/shared/clock.ts";
import { errorMessage } from "@palebluedot/shared/errors.ts";
import {
  Condition_Status,
  type Condition,
} from "@palebluedot/shared/generated/palebluedot/agent/v1/agent.ts";
import type { Logger } from "@palebluedot/shared/logger.ts";
import { writeFileAtomic } from "./atomic-file.ts";

const reserveBytes = 4 * 1024 * 1024;
/** The reserve comes back only where it is not what fills the disk again. */
const refillFactor = 4;
const refillPauseMs = 60_000;

/** Room on the disk that is given up when there is none left, so that what the agent must remember fits. */
export interface DiskReserve {
  /** Does the write; when the disk is full the reserve is given up and the write tried once more. */
  write(work: () => Promise<void>): Promise<void>;
  /** Undefined while writing works. */
  condition(): Condition | undefined;
}

const isFull = (error: unknown): boolean => {
  const { code } = error as NodeJS.ErrnoException;
  return code === "ENOSPC" || code === "EDQUOT";
};

/** Never rejects for a full disk: an agent starts on one, too. */
export async function createDiskReserve(options: {
  readonly dir: string;
  readonly clock: Clock;
  readonly log: Logger;
  readonly onChanged: () => void;
}): Promise<DiskReserve> {
  const { clock, log } = options;
  const path = join(options.dir, "disk-reserve");
  let condition: Condition | undefined;
  let nextRefillUnixMs = 0;

  function report(status: Condition["status"], reason: string, message: string): void {
    if (condition?.status === status && condition.reason === reason && condition.message === message) return;
    condition = { component: "disk", status, reason, message, sinceUnixMs: clock.now() };
    options.onChanged();
  }

  let refilling: Promise<boolean> | undefined;
  const refill = (): Promise<boolean> =>
    (refilling ??= refillNow().finally(() => {
      refilling = undefined;
    }));

  async function refillNow(): Promise<boolean> {
    if (
      await stat(path).then(
        ({ size }) => size >= reserveBytes,
        () => false,
      )
    )
      return true;
    if (clock.now() < nextRefillUnixMs) return false;
    nextRefillUnixMs = clock.now() + refillPauseMs;
    try {
      const { bavail, bsize } = await statfs(options.dir);
      if (bavail * bsize < reserveBytes * refillFactor) return false;
      // Random: a file system that compresses or leaves out zeros would reserve nothing.
      await writeFileAtomic(path, randomBytes(reserveBytes));
      return true;
    } catch (error) {
      log.warn({ path, reason: errorMessage(error) }, "the disk reserve could not be made");
      await rm(`${path}.new`, { force: true }).catch(() => undefined);
      return false;
    }
  }

  async function attempt(work: () => Promise<void>): Promise<void> {
    try {
      await work();
    } catch (error) {
      if (!isFull(error)) throw error;
      nextRefillUnixMs = clock.now() + refillPauseMs;
      await rm(path, { force: true });
      log.error({ path }, "the disk is full: the reserve was given up");
      await work();
    }
  }

  await refill();
  return {
    condition: () => condition,
    async write(work) {
      try {
        await attempt(work);
      } catch (error) {
        report(
          Condition_Status.FAILED,
          isFull(error) ? "full" : "not-writable",
          `the agent cannot write its data: ${errorMessage(error)}`.slice(0, 500),
        );
        throw error;
      }
      if (await refill()) {
        if (condition === undefined) return;
        condition = undefined;
        options.onChanged();
      } else {
        report(
          Condition_Status.DEGRADED,
          "nearly-full",
          "the disk of the agent's data has no room in reserve",
        );
      }
    },
  };
}
