import { expect, test } from "vitest";
import { sharedRead } from "./shared-read.ts";

test("callers at once and soon after share one read; later ones do not; a failure is not kept", async () => {
  let now = 1000;
  let reads = 0;
  const waiting: ((value: number | Error) => void)[] = [];
  const ask = sharedRead({ now: () => now }, 2000, () => {
    reads += 1;
    return new Promise<number>((resolve, reject) => {
      waiting.push((value) => (typeof value === "number" ? resolve(value) : reject(value)));
    });
  });
  const [first, second] = [ask(), ask()];
  now += 60_000;
  const third = ask();
  waiting[0]?.(7);
  expect(await Promise.all([first, second, third])).toEqual([7, 7, 7]);
  expect(reads).toBe(1);

  const late = ask();
  waiting[1]?.(8);
  expect(await late).toBe(8);
  now += 1999;
  expect(await ask()).toBe(8);
  now += 1;
  const failing = ask();
  waiting[2]?.(new Error("away"));
  await expect(failing).rejects.toThrow("away");
  const again = ask();
  waiting[3]?.(9);
  expect(await again).toBe(9);
});
