import { expect, test } from "vitest";
import { hostShare } from "./host-share.ts";

const capacity = { memoryBytes: 1000 * 1024 ** 3, cpus: 96 };

test("the share of the GPUs is the share of the host", () => {
  expect(hostShare(capacity, 2, 8)).toEqual({
    memoryBytes: Math.floor(capacity.memoryBytes * 0.95 * 0.25),
    cpuMillicores: 24_000,
  });
  const one = hostShare(capacity, 1, 8);
  expect((one?.memoryBytes ?? 0) * 8).toBeLessThan(capacity.memoryBytes);
  expect(hostShare(capacity, 9, 8)).toEqual(hostShare(capacity, 8, 8));
});

test("where nothing is known there is no share", () => {
  expect(hostShare(capacity, 0, 8)).toBeUndefined();
  expect(hostShare(capacity, 1, 0)).toBeUndefined();
  expect(hostShare({ memoryBytes: 0, cpus: 0 }, 1, 8)).toBeUndefined();
});
