import { describe, expect, test } from "vitest";
import { wronglyWaiting, type FreeServer, type WaitingAllocation } from "./waiting.ts";

const now = 1_000_000;
const request = (id: string, count: number, more: Partial<WaitingAllocation> = {}): WaitingAllocation => ({
  id,
  count,
  priority: 0,
  createdAt: now,
  ...more,
});
const server = (id: string, free: number): FreeServer => ({ id, gpus: 4, free });

describe("who may wait", () => {
  test("nobody who fits, when nothing is kept free", () => {
    expect(wronglyWaiting([request("a", 4), request("b", 3)], [server("s", 3)], now)).toEqual([
      "b waits for 3 GPUs while 3 are free on s",
    ]);
    expect(wronglyWaiting([request("a", 4)], [server("s", 3)], now)).toEqual([]);
  });

  test("whoever comes behind one that has waited too long, for the server kept for it and no other", () => {
    const old = request("old", 4, { createdAt: now - 300_001 });
    const small = request("small", 2);
    expect(wronglyWaiting([small, old], [server("s", 3)], now)).toEqual([]);
    expect(wronglyWaiting([small, old], [server("s", 3), server("t", 2)], now)).toEqual([
      "small waits for 2 GPUs while 2 are free on t (kept free: s for old)",
    ]);
  });

  test("not who has the higher priority, and not the one itself", () => {
    const old = request("old", 4, { createdAt: now - 300_001 });
    const urgent = request("urgent", 2, { priority: 50 });
    expect(wronglyWaiting([old, urgent], [server("s", 3)], now)).toHaveLength(1);
    expect(wronglyWaiting([old], [server("s", 4)], now)).toHaveLength(1);
  });

  test("not for one that no server could ever hold", () => {
    const impossible = request("impossible", 5, { createdAt: 0 });
    expect(wronglyWaiting([impossible, request("b", 1)], [server("s", 1)], now)).toHaveLength(1);
  });
});
