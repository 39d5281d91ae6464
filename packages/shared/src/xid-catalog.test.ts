import { readFileSync } from "node:fs";
import { join } from "node:path";
import { describe, expect, it } from "vitest";
import { recordingsDir } from "./testing/recordings.ts";
import { xidIsFatalToGpu, xidMeaning } from "./xid-catalog.ts";

describe("xidMeaning", () => {
  it.each([
    [13, "RESTART_APP"],
    [31, "RESTART_APP"],
    [43, "IGNORE"],
    [54, "CHECK_MECHANICALS"],
    [63, "IGNORE"],
    [78, "UPDATE_SWFW"],
    [79, "RESTART_BM"],
    [94, "RESTART_APP"],
    [95, "RESET_GPU"],
    [119, "RESET_GPU"],
    [149, "CHECK_NVLINK"],
    [151, "RESTART_VM"],
    [154, "READ_RECOVERY_ACTION"],
  ])("Xid %i asks for %s", (xid, action) => {
    expect(xidMeaning(xid)?.action).toBe(action);
  });

  it("does not invent a meaning for numbers outside the catalogue", () => {
    expect(xidMeaning(999)).toBeUndefined();
    expect(xidIsFatalToGpu(999)).toBe(false);
  });

  it("calls a GPU lost to the bus unusable, and a faulting application not", () => {
    expect(xidIsFatalToGpu(79)).toBe(true);
    expect(xidIsFatalToGpu(13)).toBe(false);
  });
});

const dir = recordingsDir();
describe.skipIf(dir === undefined)("the recorded catalogue", () => {
  it("agrees on every reset and restart", () => {
    const lines = readFileSync(join(dir ?? "", "gpu/kernel-log/xid-catalog.tsv"), "utf8")
      .split("\n")
      .filter((line) => /^\d/.test(line));
    let compared = 0;
    for (const line of lines) {
      const [xid, , , action] = line.split("\t");
      if (action === undefined || !/^(RESET_GPU|RESTART_\w+|IGNORE)$/.test(action)) continue;
      expect(xidMeaning(Number(xid))?.action, `Xid ${xid}`).toBe(action);
      compared += 1;
    }
    expect(compared).toBeGreaterThan(80);
  });
});
