import { existsSync } from "node:fs";
import { mkdtemp, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { systemClock } from "@palebluedot/shared/clock.ts";
import { Condition_Status } from "@palebluedot/shared/generated/palebluedot/agent/v1/agent.ts";
import { createLogger } from "@palebluedot/shared/logger.ts";
import { afterEach, beforeEach, describe, expect, test } from "vitest";
import { createDiskReserve } from "./disk-reserve.ts";

const log = createLogger({ name: "test", level: "silent" });
const full = (): Error => Object.assign(new Error("no space left on device"), { code: "ENOSPC" });

describe("disk reserve", () => {
  let dir: string;
  beforeEach(async () => {
    dir = await mkdtemp(join(tmpdir(), "pbd-disk-"));
  });
  afterEach(() => rm(dir, { recursive: true, force: true }));

  test("is given up so that the write fits, and comes back later", async () => {
    let now = systemClock.now();
    const clock = { ...systemClock, now: () => now };
    const disk = await createDiskReserve({ dir, clock, log, onChanged: () => undefined });
    const path = join(dir, "disk-reserve");
    expect(existsSync(path)).toBe(true);
    // A disk on which the write fits only into the place of the reserve.
    let written = 0;
    const write = (): Promise<void> => {
      if (existsSync(path)) return Promise.reject(full());
      written += 1;
      return Promise.resolve();
    };
    await disk.write(write);
    expect(written).toBe(1);
    expect(existsSync(path)).toBe(false);
    expect(disk.condition()).toMatchObject({ component: "disk", status: Condition_Status.DEGRADED });
    now += 120_000;
    await disk.write(() => Promise.resolve());
    expect(existsSync(path)).toBe(true);
    expect(disk.condition()).toBeUndefined();
  });

  test("a disk that stays full is a condition, and the error is the writer's", async () => {
    let told = 0;
    const disk = await createDiskReserve({ dir, clock: systemClock, log, onChanged: () => (told += 1) });
    await expect(disk.write(() => Promise.reject(full()))).rejects.toMatchObject({ code: "ENOSPC" });
    expect(disk.condition()).toMatchObject({ status: Condition_Status.FAILED, reason: "full" });
    expect(told).toBe(1);
  });
});
