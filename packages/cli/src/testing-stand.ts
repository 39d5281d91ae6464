/** A new API and an empty home for each test of the command line; importing it registers the hooks. */

import { mkdtemp, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterEach, beforeEach } from "vitest";
import { runProgram, type ProgramIo } from "./program.ts";
import { startFakeApi, type FakeApi } from "./testing-api.ts";

export let api: FakeApi;
export let directory: string;
export let interrupt: AbortController;

beforeEach(async () => {
  api = await startFakeApi();
  directory = await mkdtemp(join(tmpdir(), "pbd-test-"));
  interrupt = new AbortController();
});
afterEach(async () => {
  interrupt.abort();
  await api.close();
  await rm(directory, { recursive: true, force: true });
});

interface Run {
  readonly code: number;
  readonly out: string;
  readonly err: string;
}

interface Started extends Promise<Run> {
  /** What was printed so far. */
  readonly text: { out: string; err: string };
}

const decode = (chunk: string | Uint8Array): string =>
  typeof chunk === "string" ? chunk : Buffer.from(chunk).toString("utf8");

export function start(argv: readonly string[], io: Partial<ProgramIo> = {}): Started {
  const text = { out: "", err: "" };
  const running = runProgram(argv, {
    stdout: { write: (chunk) => void (text.out += decode(chunk)) },
    stderr: { write: (chunk) => void (text.err += decode(chunk)) },
    env: {
      PALEBLUEDOT_CLI_CONFIG: join(directory, "sub", "config.json"),
      PALEBLUEDOT_URL: api.url,
      PALEBLUEDOT_TOKEN: api.token,
    },
    readInput: () => Promise.resolve(""),
    promptHidden: undefined,
    signal: interrupt.signal,
    sleep: (ms) => new Promise((resolve) => setTimeout(resolve, Math.min(ms, 10))),
    ...io,
  }).then((code) => ({ code, ...text }));
  return Object.assign(running, { text });
}

export const run = (argv: readonly string[], io: Partial<ProgramIo> = {}): Promise<Run> => start(argv, io);
export const withoutUrl = (): ProgramIo["env"] => ({
  PALEBLUEDOT_CLI_CONFIG: join(directory, "sub", "config.json"),
});

export function addServers(count: number): void {
  for (let index = 0; index < count; index += 1) {
    api.servers.push({
      id: `01890a5d-ac96-774b-bcce-${String(index).padStart(12, "0")}`,
      name: `gpu-${index}`,
      state: "available",
      connected: true,
      gpu_count: 8,
      gpu_models: ["NVIDIA H100 80GB HBM3"],
    });
  }
}
