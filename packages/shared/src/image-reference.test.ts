import { describe, expect, test } from "vitest";
import { containerRequestSchema } from "./allocation-request.ts";
import { isHostLocalRegistry, parseImageReference } from "./image-reference.ts";

const digest = `sha256:${"0".repeat(64)}`;

test.each([
  ["busybox", undefined, "busybox", "latest", "busybox:latest"],
  ["library/busybox:1.36", undefined, "library/busybox", "1.36", "library/busybox:1.36"],
  ["localhost:5000/a/b-c:x", "localhost:5000", "localhost:5000/a/b-c", "x", "localhost:5000/a/b-c:x"],
  [`r.example/a@${digest}`, "r.example", "r.example/a", digest, `r.example/a@${digest}`],
  [
    `r.example:5000/a/b__c:1@${digest}`,
    "r.example:5000",
    "r.example:5000/a/b__c",
    digest,
    `r.example:5000/a/b__c@${digest}`,
  ],
  [
    "nvcr.io/nvidia/pytorch:24.10-py3",
    "nvcr.io",
    "nvcr.io/nvidia/pytorch",
    "24.10-py3",
    "nvcr.io/nvidia/pytorch:24.10-py3",
  ],
  ["team/a.b_c---d", undefined, "team/a.b_c---d", "latest", "team/a.b_c---d:latest"],
])("%s", (reference, registry, name, tag, canonical) => {
  expect(parseImageReference(reference)).toEqual({ registry, name, tag, canonical });
  expect(containerRequestSchema.safeParse({ image: reference }).success).toBe(true);
});

test.each([
  "",
  "a//b",
  "/a",
  "a/",
  "x/../y",
  "a/../../containers/json",
  "../a",
  "./a",
  "r.example/../a",
  "r.example/..",
  "a/%2e%2e/b",
  "a?fromSrc=-",
  "a/b#c",
  "a b",
  "a:b:c",
  "a@b",
  "A",
  "a/B",
  "a_-b",
  "a...b",
  "-a",
  "r.example:0/a",
  "r.example:99999/a",
  "r..example/a",
  "[::1]:5000/a",
  "user@r.example/a",
  "http://r.example/a",
  "a".repeat(513),
])("%j is refused by the API and by the agent", (reference) => {
  expect(() => parseImageReference(reference)).toThrow(
    expect.objectContaining({ code: "refused-image-reference" }),
  );
  expect(containerRequestSchema.safeParse({ image: reference }).success).toBe(false);
});

describe("registries on the host itself", () => {
  test.each([
    "localhost",
    "localhost:5000",
    "LOCALHOST:5000",
    "a.localhost",
    "127.0.0.1:2375",
    "127.9.9.9",
    "127.1:80",
    "0x7f.0.0.1",
    "2130706433:80",
    "0.0.0.0:1",
    "169.254.169.254",
    "169.254.169.254:80",
  ])("%s", (registry) => expect(isHostLocalRegistry(registry)).toBe(true));
  test.each(["registry.example", "10.0.0.5:5000", "192.168.1.1", "128.0.0.1", "localhost.example:5000"])(
    "not %s",
    (registry) => expect(isHostLocalRegistry(registry)).toBe(false),
  );
});
