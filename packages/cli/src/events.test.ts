import { describe, expect, test } from "vitest";
import { api, interrupt, start, run } from "./testing-stand.ts";

const event = (seq: number, type = "allocation.active"): Record<string, unknown> => ({
  seq,
  type,
  severity: "info",
  message: `number ${seq}`,
  occurred_at: "2026-01-01T00:00:00.000Z",
});
const numbers = (out: string): number[] =>
  out
    .trim()
    .split("\n")
    .filter((line) => line !== "")
    .map((line) => (JSON.parse(line) as { seq: number }).seq);

describe("events", () => {
  test("the newest come last", async () => {
    for (let seq = 1; seq <= 9; seq += 1)
      api.publish(event(seq, seq % 2 === 0 ? "server.x" : "allocation.y"));
    const result = await run(["events", "-n", "3", "--type", "allocation.", "-o", "json"]);
    const { items } = JSON.parse(result.out) as { items: { seq: number }[] };
    expect(items.map(({ seq }) => seq)).toEqual([5, 7, 9]);
  });

  test("follow goes on after a cut, without gap or duplicate", async () => {
    api.publish(event(1));
    api.publish(event(2));
    const following = start(["events", "-f", "-n", "1", "-o", "json"]);
    await expect.poll(() => api.openStreams()).toBe(1);
    api.publish(event(3));
    await expect.poll(() => numbers(following.text.out)).toEqual([2, 3]);
    api.cutStreams();
    api.publish(event(4));
    api.publish(event(5));
    await expect.poll(() => numbers(following.text.out), { timeout: 10_000 }).toEqual([2, 3, 4, 5]);
    interrupt.abort();
    expect((await following).code).toBe(0);
  });
});
