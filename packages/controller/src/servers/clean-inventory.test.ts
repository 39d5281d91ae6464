import { expect, test } from "vitest";
import { cleanStrings } from "./clean-inventory.ts";

test("strings of a message lose control characters, bytes stay bytes", () => {
  const tail = Buffer.from([0, 1, 255]);
  expect(
    cleanStrings({ list: [{ name: " a\u0000\u001b[31mb ", tail }], count: 3, absent: undefined }),
  ).toEqual({
    list: [{ name: "a  [31mb", tail }],
    count: 3,
    absent: undefined,
  });
  expect((cleanStrings({ tail }) as { tail: Buffer }).tail.subarray(-1)).toEqual(Buffer.of(255));
});
