/** A simulated server in a directory of its own, for tests; removed at the end. */
import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { execa } from "execa";
import { createSimulatedServer, type SimulatedServer, type SimulatedServerOptions } from "../server.ts";

export interface TestServer extends SimulatedServer, Disposable {
  /** Runs this server's nvidia-smi to its end; never throws. */
  smi(...args: string[]): Promise<{ readonly code: number; readonly out: string }>;
}

export function testServer(options: Partial<SimulatedServerOptions> = {}): TestServer {
  const dir = mkdtempSync(join(tmpdir(), "palebluedot-sim-"));
  let server: SimulatedServer;
  try {
    server = createSimulatedServer({ dir, model: "h100", count: 2, ...options });
  } catch (error) {
    rmSync(dir, { recursive: true, force: true });
    throw error;
  }
  return {
    ...server,
    smi: async (...args) => {
      const result = await execa(server.nvidiaSmiPath, args, { reject: false, stripFinalNewline: false });
      return { code: result.exitCode ?? -1, out: result.stdout };
    },
    [Symbol.dispose]: () => rmSync(dir, { recursive: true, force: true }),
  };
}
