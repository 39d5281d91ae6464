import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { createTestApi, type TestApi } from "../http/testing.ts";

let api: TestApi;
let acme: { id: string; token: string };
let globex: { id: string; token: string };

beforeAll(async () => {
  api = await createTestApi();
  acme = await api.makeTenant("acme");
  globex = await api.makeTenant("globex");
});
afterAll(() => api.close());

test("a list that the database does not finish in time is refused as such, and no fault of ours", async () => {
  // Another transaction holds the table for longer than a list may take.
  const done = Promise.withResolvers<undefined>();
  const locked = Promise.withResolvers<undefined>();
  const holder = api.deps.sql.begin(async (tx) => {
    await tx`lock table events in access exclusive mode`;
    locked.resolve(undefined);
    await done.promise;
  });
  await locked.promise;
  const answer = await api.call("GET", "/api/v1/events");
  done.resolve(undefined);
  await holder;
  expect(answer.status).toBe(503);
  expect(answer.json).toMatchObject({ code: "query-too-slow" });
}, 20_000);

interface SseEvent {
  readonly id: string;
  readonly event: string;
  readonly data: Record<string, unknown>;
}

/** Reads a live stream until `count` events came. */
async function readEvents(
  query: string,
  count: number,
  headers: Record<string, string>,
  onOpen: () => Promise<void> = () => Promise.resolve(),
): Promise<SseEvent[]> {
  const response = await api.app.request(`/api/v1/events${query}`, {
    headers: { accept: "text/event-stream", ...headers },
    signal: AbortSignal.timeout(20_000),
  });
  expect(response.status).toBe(200);
  expect(response.headers.get("content-type")).toBe("text/event-stream");
  const reader = (response.body as ReadableStream<Uint8Array>).getReader();
  let text = "";
  let opened = false;
  const events = (): SseEvent[] =>
    text
      .split("\n\n")
      .slice(0, -1)
      .filter((frame) => frame.startsWith("id: "))
      .map((frame) => {
        const field = (name: string): string => new RegExp(`^${name}: (.*)$`, "m").exec(frame)?.[1] ?? "";
        return {
          id: field("id"),
          event: field("event"),
          data: JSON.parse(field("data")) as Record<string, unknown>,
        };
      });
  for (const deadline = Date.now() + 15_000; events().length < count;) {
    if (Date.now() > deadline) throw new Error(`only ${events().length} of ${count} events came: ${text}`);
    const chunk = await reader.read();
    if (chunk.done) break;
    text += Buffer.from(chunk.value).toString();
    if (!opened) {
      opened = true;
      await onOpen();
    }
  }
  await reader.cancel();
  return events();
}

const bearer = (token: string) => ({ authorization: `Bearer ${token}` });

describe("the event stream", () => {
  test("resumes after Last-Event-ID without gap or duplicate, and goes on live", async () => {
    for (const name of ["a", "b", "c"])
      await api.call("POST", "/api/v1/tenants", { json: { name: `sse-${name}` } });
    await expect
      .poll(async () => (await api.call("GET", "/api/v1/events?type=tenant.")).json.items.length, {
        timeout: 10_000,
      })
      .toBeGreaterThanOrEqual(5);
    const page = await api.call("GET", "/api/v1/events?order=ascending&limit=500");
    const known = page.json.items.map((item: { seq: number }) => item.seq) as number[];
    const resumeAfter = known[1] ?? 0;
    const events = await readEvents(
      "",
      known.length - 2 + 1,
      { ...bearer(api.adminToken), "last-event-id": String(resumeAfter) },
      async () => {
        await api.call("POST", "/api/v1/tenants", { json: { name: "sse-live" } });
      },
    );
    const seqs = events.map((event) => Number(event.id));
    expect(seqs).toEqual(seqs.map((_seq, index) => resumeAfter + 1 + index));
    expect(events.at(-1)).toMatchObject({
      event: "tenant.created",
      data: { message: 'tenant "sse-live" was created' },
    });
  });

  test("a tenant's stream carries its own events only", async () => {
    const json = { gpus: { count: 1 }, container: { image: "a" } };
    const events = await readEvents("?type=allocation.", 2, bearer(acme.token), async () => {
      for (const { token } of [globex, acme, globex, acme]) {
        await api.call("POST", "/api/v1/allocations", { token, json });
      }
    });
    expect(new Set(events.map((event) => event.data["tenant_id"]))).toEqual(new Set([acme.id]));
  });

  test("ends when the token is revoked", async () => {
    const made = await api.call("POST", `/api/v1/tenants/${acme.id}/tokens`, { json: { name: "stream" } });
    const events = await readEvents("?type=nothing.", 1, bearer(made.json.token as string), async () => {
      await api.call("DELETE", `/api/v1/tenants/${acme.id}/tokens/${made.json.id}`);
    });
    expect(events).toEqual([]);
  });

  test("a Last-Event-ID that is none is refused", async () => {
    const answer = await api.call("GET", "/api/v1/events", {
      headers: { accept: "text/event-stream", "last-event-id": "-1" },
    });
    expect(answer).toMatchObject({ status: 400, json: { code: "invalid-last-event-id" } });
  });
});

describe("the list of events", () => {
  test.each(["ascending", "descending"])("pages in %s order hold each event once", async (order) => {
    const seen: number[] = [];
    let cursor = "";
    do {
      const page = await api.call(
        "GET",
        `/api/v1/events?limit=3&type=tenant.&order=${order}${cursor === "" ? "" : `&cursor=${cursor}`}`,
      );
      seen.push(...page.json.items.map((item: { seq: number }) => item.seq));
      cursor = page.json.next_cursor ?? "";
    } while (cursor !== "");
    expect(seen.length).toBeGreaterThanOrEqual(6);
    const sorted = [...new Set(seen)].sort((a, b) => (order === "ascending" ? a - b : b - a));
    expect(seen).toEqual(sorted);
  });
});
