import { mkdtemp, rm } from "node:fs/promises";
import http from "node:http";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterEach, beforeEach, expect, test } from "vitest";
import { createStand, document, eventually, workload, type Stand } from "./testing/stand.ts";

/** An engine with one container that it never gets rid of while it is stuck. */
class StuckEngine {
  stuck = true;
  readonly removals: number[] = [];
  owner = "";
  readonly server = http.createServer((request, response) => this.#answer(request, response));

  #answer(request: http.IncomingMessage, response: http.ServerResponse): void {
    const { pathname, searchParams } = new URL(request.url ?? "/", "http://engine");
    const json = (status: number, body: unknown): void => {
      response.statusCode = status;
      response.end(JSON.stringify(body));
    };
    if (pathname.endsWith("/events")) response.flushHeaders();
    else if (pathname.endsWith("/version")) json(200, { Version: "28.0.0", ApiVersion: "1.48" });
    else if (pathname.endsWith("/info")) json(200, {});
    else if (pathname.endsWith("/_ping")) response.end("OK");
    else if (pathname.endsWith("/containers/json")) {
      const { label } = JSON.parse(searchParams.get("filters") ?? "{}") as { label?: string[] };
      const labels = Object.fromEntries((label ?? []).map((one) => one.split("=") as [string, string]));
      const alive = this.stuck && labels["palebluedot.allocation"] === "job";
      json(200, alive ? [{ Id: "c1", State: "removing", Labels: labels }] : []);
    } else if (request.method === "DELETE") {
      this.removals.push(Date.now());
      json(409, { message: "removal of container c1 is already in progress" });
    } else json(404, { message: "no such" });
  }
}

let dir: string;
let engine: StuckEngine;
let stand: Stand;
beforeEach(async () => {
  dir = await mkdtemp(join(tmpdir(), "pbd-stuck-"));
  engine = new StuckEngine();
  const socketPath = join(dir, "engine.sock");
  await new Promise<void>((resolve) => engine.server.listen(socketPath, resolve));
  stand = await createStand({ dockerHost: `unix://${socketPath}`, timings: { retryBaseMs: 400 } });
});
afterEach(async () => {
  engine.stuck = false;
  await stand.close();
  engine.server.closeAllConnections();
  await new Promise((resolve) => engine.server.close(resolve));
  await rm(dir, { recursive: true, force: true });
});

test("a container that survives its removal is asked for again after pauses, and released when it is gone", async () => {
  await stand.restart();
  await stand.reconciler.setDesired(document(1, [workload("job", {}, { reclaimed: true })]));
  await eventually("removed a few times", () => (engine.removals.length >= 5 ? true : undefined));
  const pauses = engine.removals.slice(2).map((at, index) => at - (engine.removals[index + 1] ?? 0));
  // The first look again is at once; every pause after it has a floor.
  expect(Math.min(...pauses)).toBeGreaterThanOrEqual(90);
  await stand.phase("job", "STOPPING");
  engine.stuck = false;
  await stand.phase("job", "CLEAN");
});
