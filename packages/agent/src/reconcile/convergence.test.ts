import { execFile, spawn } from "node:child_process";
import { once } from "node:events";
import { existsSync } from "node:fs";
import { mkdtemp, readdir, rm } from "node:fs/promises";
import net from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { promisify } from "node:util";
import {
  ContainerSpec_PullPolicy as Pull,
  WorkloadObserved_Phase as Phase,
  type WorkloadDesired,
} from "@palebluedot/shared/generated/palebluedot/agent/v1/agent.ts";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import {
  isAvailable,
  startDockerEngine,
  type TestDockerEngine,
} from "../../../../test/support/docker-engine.ts";
import { labelNames } from "../containers/create-request.ts";
import { createContainerEngineClient } from "../containers/engine.ts";
import { createStand, document, eventually, makeDeviceNodes, output, workload } from "./testing/stand.ts";

const run = promisify(execFile);
const started = await startDockerEngine();
const why = isAvailable(started) ? "" : ` (skipped: ${started.unavailable})`;
const forever = { command: ["/bin/sh", "-c"], args: ["trap 'exit 0' TERM; while :; do sleep 0.1; done"] };

/** Repeatable randomness: mulberry32. */
function seeded(seed: number): () => number {
  let state = seed;
  return () => {
    state = (state + 0x6d2b79f5) | 0;
    let t = Math.imul(state ^ (state >>> 15), 1 | state);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) / 4_294_967_296;
  };
}

describe.skipIf(!isAvailable(started))(`convergence on a real Docker Engine${why}`, () => {
  const engine = started as TestDockerEngine;
  beforeAll(() => engine.importBusyboxImage("pbd-test"));
  afterAll(() => engine.stop());

  test("a registry that never answers delays nobody else, and a release ends the pull", async () => {
    const sockets = new Set<net.Socket>();
    const registry = net.createServer((socket) => sockets.add(socket.on("error", () => undefined)));
    await new Promise<void>((resolve) => registry.listen(0, "127.0.0.1", resolve));
    const { port } = registry.address() as net.AddressInfo;
    const stand = await createStand({
      dockerHost: engine.dockerHost,
      engine: { allowedRegistries: [`127.0.0.1:${port}`] },
      timings: { pullStallMs: 60_000 },
    });
    try {
      await stand.restart();
      const slow = Array.from({ length: 12 }, (_, index) =>
        workload(`slow-${index}`, { image: `127.0.0.1:${port}/a:${index}`, pullPolicy: Pull.IF_NOT_PRESENT }),
      );
      await stand.reconciler.setDesired(document(1, slow));
      for (const { allocationId } of slow) await stand.phase(allocationId, "PULLING");
      await stand.reconciler.setDesired(document(2, [...slow, workload("quick", forever)]));
      await stand.phase("quick", "RUNNING");
      const released = slow.map((one) => workload(one.allocationId, {}, { reclaimed: true }));
      await stand.reconciler.setDesired(document(3, released));
      for (const { allocationId } of slow) await stand.phase(allocationId, "CLEAN");
    } finally {
      for (const socket of sockets) socket.destroy();
      registry.close();
      await stand.close();
    }
  });

  test("an agent that stops does not wait for a container's grace; the next one goes on", async () => {
    const stand = await createStand({ dockerHost: engine.dockerHost });
    try {
      await stand.restart();
      const deaf = {
        command: ["/bin/sh", "-c"],
        args: ["trap '' TERM; while :; do sleep 0.1; done"],
        stopGraceSeconds: 15,
      };
      await stand.reconciler.setDesired(document(1, [workload("deaf", deaf)]));
      await stand.phase("deaf", "RUNNING");
      await stand.reconciler.setDesired(document(2, [workload("deaf", deaf, { reclaimed: true })]));
      await stand.phase("deaf", "STOPPING");
      const before = Date.now();
      await stand.restart();
      expect(Date.now() - before).toBeLessThan(10_000);
      await stand.reconciler.setDesired(
        document(3, [workload("deaf", { ...deaf, stopGraceSeconds: 1 }, { reclaimed: true })]),
      );
      await stand.phase("deaf", "CLEAN", undefined, 50_000);
    } finally {
      await stand.close();
    }
  });

  test("whatever the documents say, no GPU ever has two running containers, and in the end all is clean", async () => {
    const seed = Number(process.env["PALEBLUEDOT_TEST_SEED"] ?? Date.now() % 100_000);
    const random = seeded(seed);
    const stand = await createStand({
      dockerHost: engine.dockerHost,
      timings: { verifyMs: 100, verifyPollMs: 20 },
    });
    await makeDeviceNodes(stand.deviceDir, ["nvidia0", "nvidia1", "nvidia2", "nvidia3"]);
    const watcher = createContainerEngineClient({
      dockerHost: engine.dockerHost,
      certPath: undefined,
      callMs: 10_000,
    });
    const watching = new AbortController();
    const onGpu = new Map<string, string>();
    const doubled: string[] = [];
    let starts = 0;
    const events = await watcher.events(labelNames.allocation, watching.signal);
    const watch = (async () => {
      for await (const event of events) {
        const gpus = (event.attributes[labelNames.gpus] ?? "").split(",").filter((gpu) => gpu !== "");
        if (event.action === "start") {
          starts += 1;
          for (const gpu of gpus) {
            const other = onGpu.get(gpu);
            if (other !== undefined && other !== event.containerId)
              doubled.push(`${gpu}: ${other} and ${event.containerId}`);
            onGpu.set(gpu, event.containerId);
          }
        } else if (event.action === "die") {
          for (const gpu of gpus) if (onGpu.get(gpu) === event.containerId) onGpu.delete(gpu);
        }
      }
    })().catch(() => undefined);
    try {
      await stand.restart();
      const ids = ["a", "b", "c", "d", "e", "f"];
      const known = new Map<string, WorkloadDesired>();
      for (let generation = 1; generation <= 25; generation += 1) {
        for (const id of ids) {
          const dice = random();
          if (dice < 0.35) {
            const gpuUuids = stand.gpus.uuids.filter(() => random() < 0.35);
            known.set(
              id,
              workload(id, { ...forever, volumes: [{ name: "v", mountPath: "/v" }] }, { gpuUuids }),
            );
          } else if (dice < 0.55) {
            const { gpuUuids = [] } = known.get(id) ?? {};
            known.set(id, workload(id, forever, { gpuUuids, reclaimed: true }));
          } else if (dice < 0.65) {
            known.delete(id);
          }
        }
        await stand.reconciler.setDesired(document(generation, [...known.values()]));
        if (random() < 0.2) await stand.restart();
        const waitUntil = Date.now() + random() * 250;
        await eventually("a while", () => (Date.now() > waitUntil ? true : undefined));
      }
      await stand.reconciler.setDesired(
        document(
          100,
          ids.map((id) => workload(id, forever, { reclaimed: true })),
        ),
      );
      for (const id of ids) await stand.phase(id, "CLEAN");
      await eventually("no container left", async () =>
        (await watcher.list([labelNames.owner])).length === 0 ? true : undefined,
      );
      expect(await readdir(join(stand.dataDir, "volumes"))).toEqual([]);
      expect(doubled, `seed ${seed}`).toEqual([]);
      expect(starts).toBeGreaterThan(5);
    } catch (error) {
      throw new Error(`seed ${seed}: ${String(error)}`, { cause: error });
    } finally {
      watching.abort(new Error("done"));
      await watch;
      watcher.close();
      await stand.close();
    }
  });
});

const simulator = fileURLToPath(new URL("../../../simulator/src/main.ts", import.meta.url));

describe.skipIf(!existsSync(simulator))("the simulated engine, as a process", () => {
  test("is recognised, and runs, tells and gives back a workload", async () => {
    const dir = await mkdtemp(join(tmpdir(), "pbd-sim-"));
    const socket = join(dir, "engine.sock");
    const state = join(dir, "state");
    await run(process.execPath, [
      simulator,
      "server",
      "create",
      "--state",
      state,
      "--model",
      "h100",
      "--count",
      "2",
    ]);
    const smi = fileURLToPath(new URL("../../../simulator/bin/nvidia-smi", import.meta.url));
    const listed = await run(smi, ["-L"], { env: { ...process.env, PALEBLUEDOT_SIM_STATE: state } });
    const gpuUuids = listed.stdout.match(/GPU-[0-9a-f-]+/g) ?? [];
    const child = spawn(process.execPath, [simulator, "engine", "--state", state, "--socket", socket], {
      stdio: ["ignore", "ignore", "pipe"],
    });
    let errors = "";
    child.stderr.on("data", (chunk: Buffer) => (errors += chunk.toString()));
    const exited = once(child, "exit");
    const stand = await createStand({ dockerHost: `unix://${socket}`, gpuUuids });
    try {
      await eventually(`the engine's socket ${errors}`, () => (existsSync(socket) ? true : undefined));
      await stand.restart();
      expect(stand.reconciler.engine()).toMatchObject({ simulated: true });
      const [gpu = ""] = stand.gpus.uuids;
      const job = { image: "sim/burn", pullPolicy: Pull.IF_NOT_PRESENT };
      await stand.reconciler.setDesired(document(1, [workload("job", job, { gpuUuids: [gpu] })]));
      await stand.phase("job", "RUNNING");
      await eventually("output", async () =>
        (await output(stand.reconciler, "job")) === "" ? undefined : true,
      );
      await stand.restart();
      await stand.phase("job", "RUNNING");
      await stand.reconciler.setDesired(
        document(2, [workload("job", job, { gpuUuids: [gpu], reclaimed: true })]),
      );
      await stand.phase("job", "CLEAN");
      expect(stand.of("job")?.phase).toBe(Phase.CLEAN);
    } finally {
      await stand.close();
      child.kill("SIGTERM");
      await exited;
      await rm(dir, { recursive: true, force: true });
    }
  });
});
