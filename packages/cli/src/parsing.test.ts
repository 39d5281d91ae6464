import { describe, expect, test } from "vitest";
import { formatBytes, formatSpan, parseBytes, parseDurationSeconds } from "./quantities.ts";
import { readServerSentEvents, type ServerSentEvent } from "./server-sent-events.ts";

test.each([
  ["8h", 28_800],
  ["1h30m", 5400],
  ["45s", 45],
  ["7d", 604_800],
  ["90", 90],
])("duration %s", (text, seconds) => {
  expect(parseDurationSeconds(text)).toBe(seconds);
});

test.each(["", "h", "8 h", "-1h", "1.5h", "8h!", "8x"])("duration %j is refused", (text) => {
  expect(() => parseDurationSeconds(text)).toThrow(expect.objectContaining({ code: "duration-invalid" }));
});

test.each([
  ["80Gi", 80 * 1024 ** 3],
  ["1.5GiB", 1.5 * 1024 ** 3],
  ["512m", 512 * 1024 ** 2],
  ["4096", 4096],
])("size %s", (text, bytes) => {
  expect(parseBytes(text)).toBe(bytes);
});

test.each(["", "Gi", "-1", "1 Gi", "1e9", "8X"])("size %j is refused", (text) => {
  expect(() => parseBytes(text)).toThrow(expect.objectContaining({ code: "size-invalid" }));
});

test("for tables", () => {
  expect([0, 1023, 1024, 85_899_345_920].map(formatBytes)).toEqual(["0 B", "1023 B", "1.0 KiB", "80.0 GiB"]);
  expect([-5, 12_000, 300_000, 9_000_000, 300_000_000].map(formatSpan)).toEqual([
    "0s",
    "12s",
    "5m",
    "2h",
    "3d",
  ]);
});

async function read(chunks: readonly string[]): Promise<ServerSentEvent[]> {
  async function* source(): AsyncGenerator<Uint8Array> {
    for (const chunk of chunks) yield await Promise.resolve(Buffer.from(chunk, "latin1"));
  }
  const events: ServerSentEvent[] = [];
  for await (const event of readServerSentEvents(source())) events.push(event);
  return events;
}

describe("server-sent events", () => {
  const stream =
    ": hello\n\nid: 1\nevent: a.b\ndata: one\n\nid: 2\r\ndata:two\r\ndata: three\r\n\r\ndata: cut";
  const expected = [
    { id: "1", event: "a.b", data: "one" },
    { id: "2", event: "message", data: "two\nthree" },
  ];

  test("in one piece", async () => {
    expect(await read([stream])).toEqual(expected);
  });

  test("a byte at a time", async () => {
    expect(await read(stream.split(""))).toEqual(expected);
  });

  test("a character cut in two arrives whole", async () => {
    const bytes = Buffer.from("data: Größe\n\n").toString("latin1");
    const cut = bytes.indexOf("\xc3") + 1;
    expect(await read([bytes.slice(0, cut), bytes.slice(cut)])).toMatchObject([{ data: "Größe" }]);
  });
});
