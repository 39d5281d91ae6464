import { request } from "node:http";
import { z } from "zod";
import { addGpuProcess } from "../server.ts";

const listSchema = z.array(z.object({ Id: z.string(), Labels: z.record(z.string(), z.string()) }));
const inspectSchema = z.object({ State: z.object({ Pid: z.int() }) });

/** GET on a Docker Engine's Unix socket. Rejects after five seconds without an answer. */
export function engineGet(socketPath: string, path: string): Promise<unknown> {
  return new Promise((resolve, reject) => {
    const call = request({ socketPath, path, timeout: 5000 }, (response) => {
      const chunks: Buffer[] = [];
      response.on("data", (chunk: Buffer) => chunks.push(chunk));
      response.on("end", () => {
        const text = Buffer.concat(chunks).toString();
        if (response.statusCode !== 200) reject(new Error(`${path}: ${response.statusCode} ${text}`));
        else resolve(text.startsWith("{") || text.startsWith("[") ? JSON.parse(text) : text);
      });
      response.on("error", reject);
    });
    call.on("timeout", () => call.destroy(new Error(`${path}: no answer`)));
    call.on("error", reject);
    call.end();
  });
}

/**
 * A real engine knows nothing of simulated GPUs: this puts the main process of each container of ours onto
 * the simulated GPUs that the container was given, so that load, memory and temperature move. The process
 * leaves the GPU by itself when it ends.
 */
export function loadFromContainers(
  socketPath: string,
  servers: readonly {
    readonly stateDir: string;
    readonly gpus: readonly { readonly uuid: string; readonly index: number }[];
  }[],
): { stop(): void } {
  const known = new Set<string>();
  let stopped = false;
  const look = async (): Promise<void> => {
    const filters = encodeURIComponent(
      JSON.stringify({ label: ["palebluedot.allocation"], status: ["running"] }),
    );
    const containers = listSchema.parse(await engineGet(socketPath, `/containers/json?filters=${filters}`));
    for (const { Id: id, Labels: labels } of containers) {
      if (known.has(id)) continue;
      known.add(id);
      const inspected = inspectSchema.parse(await engineGet(socketPath, `/containers/${id}/json`));
      for (const uuid of (labels["palebluedot.gpus"] ?? "").split(",")) {
        for (const server of servers) {
          const gpu = server.gpus.find((candidate) => candidate.uuid === uuid);
          if (gpu === undefined) continue;
          addGpuProcess(server.stateDir, gpu.index, {
            pid: inspected.State.Pid,
            name: "train",
            memoryMib: 12_000,
            utilization: 92,
          });
        }
      }
    }
  };
  const loop = async (): Promise<void> => {
    while (!stopped) {
      await look().catch(() => undefined);
      await new Promise((resolve) => setTimeout(resolve, 500));
    }
  };
  void loop();
  return {
    stop() {
      stopped = true;
    },
  };
}
