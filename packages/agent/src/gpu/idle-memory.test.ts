import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { loadIdleMemory } from "./idle-memory.ts";

const mib = 1024 * 1024;
const total = 80 * 1024 * mib;
const gpu = "GPU-11111111-2222-3333-4444-555555555555";
let dir: string;

beforeEach(() => {
  dir = mkdtempSync(join(tmpdir(), "pbd-idle-"));
});
afterEach(() => {
  rmSync(dir, { recursive: true, force: true });
});

describe("the idle level", () => {
  it("is the lowest reading without processes, and survives a restart", async () => {
    const idle = await loadIdleMemory(dir);
    idle.learn(gpu, 90 * mib, total);
    idle.learn(gpu, 50 * mib, total);
    idle.learn(gpu, 400 * mib, total);
    await idle.save();
    const later = await loadIdleMemory(dir);
    expect(later.allowedBytes(gpu, total)).toBe((50 + 64) * mib);
  });

  it("is not learned from residue of several GiB", async () => {
    const idle = await loadIdleMemory(dir);
    idle.learn(gpu, 4000 * mib, total);
    expect(idle.allowedBytes(gpu, total)).toBe(1024 * mib);
    expect(idle.allowedBytes(gpu, 16 * 1024 * mib)).toBe(512 * mib);
  });

  it("does without a damaged file", async () => {
    writeFileSync(join(dir, "gpu-idle-memory.json"), '{"GPU-x": -5');
    const idle = await loadIdleMemory(dir);
    idle.learn(gpu, 0, total);
    expect(idle.allowedBytes(gpu, total)).toBe(64 * mib);
  });
});
