import { describe, expect, it } from "vitest";
import { normaliseMac, normaliseSerial, normaliseUuid } from "./identity.ts";

describe("normaliseSerial", () => {
  it.each([
    "To be filled by O.E.M.",
    "  to be FILLED by o.e.m. ",
    "To be filled\tby O.E.M.",
    "Default string",
    "Not Specified",
    "None",
    "0123456789",
    "System Serial Number",
    "0",
    "00000000",
    "........",
    "XXXXXXXX",
    "----",
    "",
    "\u0000\u0001",
    undefined,
    "A1".repeat(200),
  ])("takes %j for nobody's serial", (raw) => {
    expect(normaliseSerial(raw)).toBe("");
  });

  it.each([
    ["CN7792194A0123", "CN7792194A0123"],
    ["  8XK2 QZ3 \n", "8XK2 QZ3"],
    ["7", "7"],
    ["S411795X1B\u200B", "S411795X1B"],
    // Starts like the placeholder, but is longer than any of them.
    ["0123456789ABCDEF42", "0123456789ABCDEF42"],
  ])("keeps %j", (raw, expected) => {
    expect(normaliseSerial(raw)).toBe(expected);
  });
});

describe("normaliseUuid", () => {
  it.each([
    "00000000-0000-0000-0000-000000000000",
    "FFFFFFFF-FFFF-FFFF-FFFF-FFFFFFFFFFFF",
    "ffffffffffffffffffffffffffffffff",
    "03000200-0400-0500-0006-000700080009",
    "33333333-3333-3333-3333-333333333333",
    "Not Settable",
    "4c4c4544-0053-5a10",
    undefined,
  ])("takes %j for nobody's UUID", (raw) => {
    expect(normaliseUuid(raw)).toBe("");
  });

  it.each([
    ["4C4C4544-0053-5A10-8044-B7C04F564233", "4c4c4544-0053-5a10-8044-b7c04f564233"],
    ["4c4c454400535a108044b7c04f564233", "4c4c4544-0053-5a10-8044-b7c04f564233"],
    ["{4c4c4544-0053-5a10-8044-b7c04f564233}\n", "4c4c4544-0053-5a10-8044-b7c04f564233"],
  ])("brings %j to one form", (raw, expected) => {
    expect(normaliseUuid(raw)).toBe(expected);
  });
});

describe("normaliseMac", () => {
  it.each(["00:00:00:00:00:00", "ff:ff:ff:ff:ff:ff", "01:00:5e:00:00:01", "b8:3f:d2", "x", "", undefined])(
    "refuses %j",
    (raw) => {
      expect(normaliseMac(raw)).toBe("");
    },
  );

  // 20-byte InfiniBand addresses are no MAC: a prefix of one would name the wrong port.
  it("refuses an InfiniBand link-layer address", () => {
    expect(normaliseMac("00:00:10:29:fe:80:00:00:00:00:00:00:b8:3f:d2:03:00:92:9a:b0")).toBe("");
  });

  it.each(["B8:3F:D2:00:92:9A", "b8-3f-d2-00-92-9a", "b83f.d200.929a", "b83fd200929a"])(
    "brings %s to colon form",
    (raw) => {
      expect(normaliseMac(raw)).toBe("b8:3f:d2:00:92:9a");
    },
  );
});
