import { existsSync, readFileSync } from "node:fs";
import { mkdir, readdir, stat, symlink, writeFile } from "node:fs/promises";
import { join } from "node:path";
import {
  ContainerSpec_RestartPolicy as Restart,
  LogChunk_Stream,
  WorkloadObserved_Phase as Phase,
} from "@palebluedot/shared/generated/palebluedot/agent/v1/agent.ts";
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, test } from "vitest";
import {
  isAvailable,
  startDockerEngine,
  type TestDockerEngine,
} from "../../../../test/support/docker-engine.ts";
import {
  createStand,
  document,
  eventually,
  makeDeviceNodes,
  output,
  workload,
  type Stand,
} from "./testing/stand.ts";

const started = await startDockerEngine();
const why = isAvailable(started) ? "" : ` (skipped: ${started.unavailable})`;

interface Inspected {
  readonly Id: string;
  readonly State: { readonly Status: string; readonly StartedAt: string };
  readonly Config: { readonly Env: string[]; readonly Labels: Record<string, string> };
  readonly HostConfig: Record<string, unknown>;
}

const script = (text: string) => ({ command: ["/bin/sh", "-c"], args: [text] });
const forever = script("trap 'exit 0' TERM; while :; do sleep 0.1; done");

describe.skipIf(!isAvailable(started))(`containers on a real Docker Engine${why}`, () => {
  const engine = started as TestDockerEngine;
  let stand: Stand;

  const inspect = (id: string) => engine.api("GET", `/containers/${id}/json`) as Promise<Inspected>;
  const ofOwner = async () =>
    (await engine.api("GET", "/containers/json?all=1")) as { Id: string; Labels: Record<string, string> }[];

  beforeAll(async () => {
    await engine.importBusyboxImage("pbd-test");
    await engine.importBusyboxImage("pbd-greedy", {
      env: {
        NVIDIA_VISIBLE_DEVICES: "all",
        NVIDIA_DRIVER_CAPABILITIES: "all",
        NVIDIA_REQUIRE_CUDA: "cuda>=99",
      },
      labels: { "palebluedot.allocation": "forged" },
    });
  });
  afterAll(() => engine.stop());
  beforeEach(async () => {
    stand = await createStand({ dockerHost: engine.dockerHost });
    await makeDeviceNodes(stand.deviceDir, [
      "nvidia0",
      "nvidia1",
      "nvidia2",
      "nvidia3",
      "nvidiactl",
      "nvidia-uvm",
    ]);
  });
  afterEach(async () => {
    await stand.close();
    for (const { Id } of await ofOwner()) {
      await engine.api("DELETE", `/containers/${Id}?force=1&v=1`).catch(() => undefined);
    }
  });

  const nodes = script("ls /dev | grep nvidia | tr '\\n' ' '; env | grep -i nvidia | sort | tr '\\n' ' '");

  test("two tenants each see only their own device nodes; without GPUs, or with an image that asks for all, there are none", async () => {
    await stand.restart();
    expect(stand.reconciler.engine()).toMatchObject({
      name: "docker",
      gpuMode: "device-nodes",
      simulated: false,
    });
    const [g0 = "", g1 = "", g2 = ""] = stand.gpus.uuids;
    const openOthers = script(
      "for n in nvidia0 nvidia3; do mknod /dev/mine-$n c 195 0 && cat /dev/mine-$n; done; ls /dev | grep ^nvidia | tr '\\n' ' '",
    );
    await stand.reconciler.setDesired(
      document(1, [
        workload("a", nodes, { gpuUuids: [g0, g1] }),
        workload("b", nodes, { gpuUuids: [g2], tenantId: "tenant-b" }),
        workload("none", {
          ...nodes,
          environment: [{ name: "NVIDIA_VISIBLE_DEVICES", value: "0", secret: false }],
        }),
        workload("greedy", { ...nodes, image: "pbd-greedy" }),
        workload("sneaky", { ...openOthers, image: "pbd-greedy" }),
      ]),
    );
    for (const id of ["a", "b", "none", "greedy", "sneaky"]) await stand.phase(id, "EXITED");
    // Minor numbers run against the indexes: GPU 0 is nvidia3.
    expect(await output(stand.reconciler, "a")).toBe(
      "nvidia-uvm nvidia2 nvidia3 nvidiactl NVIDIA_VISIBLE_DEVICES=void ",
    );
    expect(await output(stand.reconciler, "b")).toBe(
      "nvidia-uvm nvidia1 nvidiactl NVIDIA_VISIBLE_DEVICES=void ",
    );
    expect(await output(stand.reconciler, "none")).toBe("NVIDIA_VISIBLE_DEVICES=void ");
    expect(await output(stand.reconciler, "greedy")).toBe("NVIDIA_VISIBLE_DEVICES=void ");
    // A node a tenant makes itself opens nothing: the device cgroup says no.
    expect(await output(stand.reconciler, "sneaky")).toContain("Operation not permitted");
    const forged = (await ofOwner()).filter((one) => one.Labels["palebluedot.allocation"] === "forged");
    expect(forged).toEqual([]);
  });

  test("output is told apart by stream, follows a running container and ends with it", async () => {
    await stand.restart();
    await stand.reconciler.setDesired(
      document(1, [workload("talk", script("echo out; echo err >&2; sleep 1; echo late"))]),
    );
    await stand.phase("talk", "RUNNING");
    const chunks: { stream: number; text: string }[] = [];
    const request = {
      streamId: "s",
      allocationId: "talk",
      follow: true,
      tailLines: 0,
      sinceUnixMs: 0,
      timestamps: false,
    };
    for await (const chunk of stand.reconciler.logs(request, AbortSignal.timeout(20_000))) {
      chunks.push({ stream: chunk.stream, text: Buffer.from(chunk.data).toString() });
    }
    const text = (stream: number) =>
      chunks
        .filter((chunk) => chunk.stream === stream)
        .map((chunk) => chunk.text)
        .join("");
    expect(text(LogChunk_Stream.STDOUT)).toBe("out\nlate\n");
    expect(text(LogChunk_Stream.STDERR)).toBe("err\n");
    await expect(output(stand.reconciler, "nobody")).rejects.toMatchObject({ code: "workload-not-found" });
  });

  test("limits reach the engine: memory without swap, processors, processes, shared memory, bounded logs", async () => {
    await stand.restart();
    await stand.reconciler.setDesired(
      document(1, [
        workload("limited", {
          ...script(
            "df -k /dev/shm | tail -1; ulimit -n; tail -c +1 /dev/zero | head -c 200000000 | tail | wc -c",
          ),
          memoryBytes: 32 * 1024 * 1024,
          cpuMillicores: 500,
          pids: 20,
          shmBytes: 8 * 1024 * 1024,
          ulimits: [{ name: "nofile", soft: 111, hard: 222 }],
        }),
      ]),
    );
    const seen = await stand.phase("limited", "EXITED");
    expect(seen).toMatchObject({ reason: "oom-killed", oomKilled: true });
    expect(await output(stand.reconciler, "limited")).toMatch(/shm\s+8192[^]*\n111\n/);
    const { HostConfig } = await inspect(seen.containerId);
    expect(HostConfig).toMatchObject({
      Memory: 33554432,
      MemorySwap: 33554432,
      NanoCpus: 500_000_000,
      PidsLimit: 20,
      SecurityOpt: ["no-new-privileges:true"],
      Privileged: false,
      Init: true,
      LogConfig: { Type: "json-file", Config: { "max-file": "4", "max-size": "16m" } },
    });
    expect(stand.events.map((event) => event.type)).toContain("container.oom-killed");
  });

  test("a container outlives its agent: adopted by its labels, neither restarted nor made anew", async () => {
    await stand.restart();
    const [gpu = ""] = stand.gpus.uuids;
    await stand.reconciler.setDesired(document(7, [workload("long", forever, { gpuUuids: [gpu] })]));
    const before = await stand.phase("long", "RUNNING");
    await stand.restart();
    expect(stand.reconciler.held()).toEqual({ incarnation: "incarnation-1", generation: 7 });
    const after = await stand.phase("long", "RUNNING");
    expect(after.containerId).toBe(before.containerId);
    expect(after.startedAtUnixMs).toBe(before.startedAtUnixMs);
    expect((await ofOwner()).length).toBe(1);
    // The adopted one still holds its GPU.
    await stand.reconciler.setDesired(
      document(8, [
        workload("long", forever, { gpuUuids: [gpu] }),
        workload("next", forever, { gpuUuids: [gpu] }),
      ]),
    );
    await stand.phase("next", "ACCEPTED", "waiting-for-gpu");
    // A lower generation of the same incarnation is ignored, another incarnation begins a new order.
    await stand.reconciler.setDesired(document(3, []));
    expect(stand.reconciler.held().generation).toBe(8);
    await stand.reconciler.setDesired(
      document(
        1,
        [
          workload("long", forever, { gpuUuids: [gpu], reclaimed: true }),
          workload("next", forever, { gpuUuids: [gpu] }),
        ],
        {
          incarnation: "incarnation-2",
        },
      ),
    );
    await stand.phase("long", "CLEAN");
    await stand.phase("next", "RUNNING");
    expect(stand.reconciler.held()).toEqual({ incarnation: "incarnation-2", generation: 1 });
  });

  test("what nobody wants is removed, but only once a document is held, and never what is another's", async () => {
    const other = await createStand({ dockerHost: engine.dockerHost });
    try {
      await other.restart();
      await other.reconciler.setDesired(document(1, [workload("others", forever)]));
      const others = await other.phase("others", "RUNNING");
      await stand.restart();
      await stand.reconciler.setDesired(
        document(1, [
          workload("keep", forever),
          workload("orphan", { ...forever, volumes: [{ name: "v", mountPath: "/v" }] }),
        ]),
      );
      await stand.phase("keep", "RUNNING");
      const orphan = await stand.phase("orphan", "RUNNING");
      await stand.reconciler.setDesired(document(2, [workload("keep", forever)]));
      await eventually("orphan gone", async () =>
        (await ofOwner()).some(({ Id }) => Id === orphan.containerId) ? undefined : true,
      );
      await eventually("its volume gone", () =>
        existsSync(join(stand.dataDir, "volumes", "orphan")) ? undefined : true,
      );
      expect((await inspect(others.containerId)).State.Status).toBe("running");
      expect(stand.of("keep")?.phase).toBe(Phase.RUNNING);
      await eventually("told", () => stand.events.find((event) => event.type === "container.orphan-removed"));

      // The document lost (a damaged disk): what runs is left alone until there is a new one.
      await stand.reconciler.stop();
      await writeFile(join(stand.dataDir, "desired.json"), "garbage");
      await stand.restart();
      expect(stand.reconciler.held()).toEqual({ incarnation: "", generation: 0 });
      const keep = (await ofOwner()).find(({ Labels }) => Labels["palebluedot.allocation"] === "keep");
      expect((await inspect(keep?.Id ?? "")).State.Status).toBe("running");
      await stand.reconciler.setDesired(document(1, []));
      await eventually("removed now", async () =>
        (await ofOwner()).some(({ Id }) => Id === keep?.Id) ? undefined : true,
      );
    } finally {
      await other.close();
    }
  });

  test("release stops, removes, deletes volumes without following links, and verifies the GPUs", async () => {
    await stand.restart();
    const [gpu = ""] = stand.gpus.uuids;
    const precious = join(stand.dataDir, "precious");
    await writeFile(precious, "keep me");
    const spec = {
      ...script(
        "echo data > /data/file; mkdir -p /data/deep/er; chmod 000 /data/deep; ln -s / /data/root; trap '' TERM; while :; do sleep 0.1; done",
      ),
      volumes: [{ name: "data", mountPath: "/data" }],
    };
    await stand.reconciler.setDesired(document(1, [workload("job", spec, { gpuUuids: [gpu] })]));
    const running = await stand.phase("job", "RUNNING");
    const volume = join(stand.dataDir, "volumes", "job", "data");
    await eventually("written", () => (existsSync(join(volume, "file")) ? true : undefined));
    await symlink(stand.dataDir, join(volume, "up"));

    stand.gpus.occupied.set(gpu, [{ gpuUuid: gpu, pid: 4711, processName: "python", memoryUsedBytes: 1e9 }]);
    const reclaimed = [workload("job", spec, { gpuUuids: [gpu], reclaimed: true })];
    await stand.reconciler.setDesired(
      document(2, [...reclaimed, workload("next", forever, { gpuUuids: [gpu] })]),
    );
    const dirty = await stand.phase("job", "DIRTY", "gpu-not-idle");
    expect(dirty.holders).toMatchObject([{ gpuUuid: gpu, pid: 4711, processName: "python" }]);
    expect((await ofOwner()).map(({ Id }) => Id)).not.toContain(running.containerId);
    expect(existsSync(volume)).toBe(false);
    expect(readFileSync(precious, "utf8")).toBe("keep me");
    // Nobody gets a GPU that is not clean.
    expect(stand.of("next")).toMatchObject({ phase: Phase.ACCEPTED, reason: "waiting-for-gpu" });

    stand.gpus.unknownReason = "nvidia-smi hangs";
    await stand.phase("job", "DIRTY", "gpu-state-unknown");
    stand.gpus.unknownReason = undefined;
    stand.gpus.occupied.clear();
    expect((await stand.phase("job", "CLEAN")).holders).toEqual([]);
    await stand.phase("next", "RUNNING");
    expect(stand.events.map(({ type }) => type)).toEqual(
      expect.arrayContaining(["workload.dirty", "workload.clean"]),
    );
  });

  test("a GPU that is not clean stays held over a restart of the agent; who only waited for it gives nothing back", async () => {
    await stand.restart();
    const [gpu = ""] = stand.gpus.uuids;
    await stand.reconciler.setDesired(document(1, [workload("first", forever, { gpuUuids: [gpu] })]));
    await stand.phase("first", "RUNNING");
    stand.gpus.occupied.set(gpu, [{ gpuUuid: gpu, pid: 1, processName: "left", memoryUsedBytes: 1 }]);
    const first = workload("first", forever, { gpuUuids: [gpu], reclaimed: true });
    const waits = workload("waits", forever, { gpuUuids: [gpu] });
    // The waiting one comes first in the document: order must not decide.
    await stand.reconciler.setDesired(document(2, [waits, first]));
    await stand.phase("first", "DIRTY");
    await stand.restart();
    expect(stand.of("first")?.phase).toBe(Phase.DIRTY);
    await stand.phase("waits", "ACCEPTED", "waiting-for-gpu");
    await stand.reconciler.setDesired(
      document(3, [workload("waits", forever, { gpuUuids: [gpu], reclaimed: true }), first]),
    );
    await stand.phase("waits", "CLEAN");
    expect(stand.of("first")?.phase).toBe(Phase.DIRTY);
    expect(stand.events.filter((event) => event.type === "container.started").length).toBe(1);

    // Also when the document forgets it: the GPU is the last one's until it was seen clean.
    await stand.reconciler.setDesired(document(4, [waits]));
    await stand.restart();
    await stand.phase("waits", "ACCEPTED", "waiting-for-gpu");
    await stand.reconciler.setDesired(
      document(5, [first, workload("waits", forever, { gpuUuids: [gpu], reclaimed: true })]),
    );
    await stand.phase("waits", "CLEAN");

    stand.gpus.occupied.clear();
    await stand.phase("first", "CLEAN");
    const next = workload("next", forever, { gpuUuids: [gpu] });
    await stand.reconciler.setDesired(document(6, [first, next]));
    await stand.phase("next", "RUNNING");
    // The next tenant works on it: that makes the verified one no less clean, also after a restart.
    stand.gpus.occupied.set(gpu, [{ gpuUuid: gpu, pid: 2, processName: "next", memoryUsedBytes: 1 }]);
    await stand.restart();
    expect(stand.of("first")?.phase).toBe(Phase.CLEAN);
    await stand.phase("next", "RUNNING");
    expect(stand.of("first")?.phase).toBe(Phase.CLEAN);
    stand.gpus.occupied.clear();
  });

  test("an engine that is away changes no phase; when it is back the work goes on", async () => {
    if (!engine.daemon) return;
    await stand.restart();
    await stand.reconciler.setDesired(
      document(1, [
        workload("service", { ...forever, restartPolicy: Restart.ALWAYS }),
        workload("job", { ...forever, restartPolicy: Restart.NEVER }),
      ]),
    );
    await stand.phase("service", "RUNNING");
    await stand.phase("job", "RUNNING");
    const told: number[] = [];
    stand.reconciler.onObserved((observed) =>
      told.push(...observed.workloads.filter((one) => one.allocationId === "gone").map((one) => one.phase)),
    );
    await engine.daemon.stop();
    try {
      await eventually("condition", () =>
        stand.reconciler
          .conditions()
          .find((one) => one.component === "container-engine" && one.reason === "unresponsive"),
      );
      const before = stand.of("service")?.phase;
      expect([Phase.RUNNING, Phase.CREATING]).toContain(before);
      // Asked to give it back while the engine is away: nothing may be claimed.
      await stand.reconciler.setDesired(
        document(2, [
          workload("service", { ...forever, restartPolicy: Restart.ALWAYS }),
          workload("job", { ...forever, restartPolicy: Restart.NEVER }),
          workload("gone", forever, { reclaimed: true }),
        ]),
      );
      await stand.restart();
      // Also an agent that starts now says what was last known, not that it is gone.
      expect(stand.of("service")?.phase).toBe(before);
      expect(stand.of("gone")?.phase).toBe(Phase.ACCEPTED);
      expect(told).not.toContain(Phase.CLEAN);
    } finally {
      await engine.daemon.start();
    }
    await stand.phase("gone", "CLEAN");
    await eventually("restarted", () => ((stand.of("service")?.restartCount ?? 0) >= 1 ? true : undefined));
    await stand.phase("service", "RUNNING");
    await stand.phase("job", "EXITED");
  });

  test("restart policy: on failure up to the limit, counted over a restart of the agent", async () => {
    await stand.restart();
    await stand.reconciler.setDesired(
      document(1, [
        workload("fails", { ...script("exit 3"), restartPolicy: Restart.ON_FAILURE, maxRestarts: 2 }),
        workload("works", { ...script("exit 0"), restartPolicy: Restart.ON_FAILURE, maxRestarts: 2 }),
      ]),
    );
    expect(await stand.phase("fails", "EXITED")).toMatchObject({
      exitCode: 3,
      restartCount: 2,
      reason: "exited",
    });
    expect(await stand.phase("works", "EXITED")).toMatchObject({
      exitCode: 0,
      restartCount: 0,
      reason: "completed",
    });
    const exits = stand.events.filter(
      (event) => event.type === "container.exited" && event.allocationId === "fails",
    );
    expect(exits.length).toBe(3);
    await stand.restart();
    expect(await stand.phase("fails", "EXITED")).toMatchObject({ exitCode: 3, restartCount: 2 });
    expect(
      stand.events.filter((event) => event.allocationId === "fails" && event.type === "container.exited")
        .length,
    ).toBe(3);
  });

  test("a changed wish replaces the container, the same one keeps it", async () => {
    await stand.restart();
    await stand.reconciler.setDesired(document(1, [workload("w", forever)]));
    const first = await stand.phase("w", "RUNNING");
    await stand.reconciler.setDesired(document(2, [workload("w", forever)]));
    await stand.reconciler.setDesired(
      document(3, [workload("w", { ...forever, environment: [{ name: "A", value: "1", secret: false }] })]),
    );
    const second = await eventually("replaced", () => {
      const seen = stand.of("w");
      return seen?.phase === Phase.RUNNING && seen.containerId !== first.containerId ? seen : undefined;
    });
    expect((await ofOwner()).map(({ Id }) => Id)).toEqual([second.containerId]);
  });

  test("while draining nothing new is started and what runs goes on", async () => {
    await stand.restart();
    await stand.reconciler.setDesired(document(1, [workload("old", forever)]));
    await stand.phase("old", "RUNNING");
    await stand.reconciler.setDesired(
      document(2, [workload("old", forever), workload("new", forever)], { drain: true }),
    );
    await stand.phase("new", "ACCEPTED", "draining");
    expect(stand.of("old")?.phase).toBe(Phase.RUNNING);
    await stand.reconciler.setDesired(document(3, [workload("old", forever), workload("new", forever)]));
    await stand.phase("new", "RUNNING");
  });

  test("what cannot be started says why", async () => {
    await stand.restart();
    await stand.reconciler.setDesired(
      document(1, [
        workload("no-image", { image: "registry.invalid/none:1" }),
        workload("no-registry", { image: "127.0.0.1:9/none:1", pullPolicy: 1 }),
        workload("no-program", { command: ["/does/not/exist"] }),
        workload("no-user", { ...forever, user: "nobody-of-this-name" }),
        workload("privileged", { ...forever, privileged: true }),
        workload("no-gpu", forever, { gpuUuids: ["GPU-not-here"] }),
        workload("fine", forever),
      ]),
    );
    await stand.phase("fine", "RUNNING");
    await stand.phase("no-image", "FAILED", "image-not-present");
    await stand.phase("no-registry", "FAILED", "image-pull-failed");
    expect((await stand.phase("no-program", "EXITED")).message).toContain(
      "127 (the program is not in the image)",
    );
    await stand.phase("no-user", "FAILED", "container-start-failed");
    await stand.phase("privileged", "FAILED", "refused-privileged");
    await stand.phase("no-gpu", "ACCEPTED", "gpu-not-present");
    expect(stand.events.find((event) => event.type === "workload.refused")?.data).toEqual({
      reason: "refused-privileged",
    });
    await stand.restart();
    expect(stand.of("privileged")).toMatchObject({ phase: Phase.FAILED, reason: "refused-privileged" });
  });

  test("secrets are on disk only encrypted, files are the agent's alone", async () => {
    await stand.restart();
    const secret = "correct-horse-battery";
    await stand.reconciler.setDesired(
      document(1, [
        workload("s", {
          ...script("echo got $PASSWORD"),
          environment: [{ name: "PASSWORD", value: secret, secret: true }],
          registry: { server: "r.example", username: "u", password: `${secret}-2` },
        }),
      ]),
    );
    await stand.phase("s", "EXITED");
    expect(await output(stand.reconciler, "s")).toBe(`got ${secret}\n`);
    await stand.reconciler.stop();
    for (const name of await readdir(stand.dataDir)) {
      const path = join(stand.dataDir, name);
      const facts = await stat(path);
      if (!facts.isFile()) continue;
      expect(readFileSync(path, "utf8"), name).not.toContain(secret);
      expect(facts.mode & 0o777, name).toBe(0o600);
    }
    expect((await stat(stand.dataDir)).mode & 0o777).toBe(0o700);
    await stand.restart();
  });

  test("volumes left by an interrupted release are deleted at the next start", async () => {
    await stand.restart();
    await stand.reconciler.setDesired(document(1, []));
    await stand.reconciler.stop();
    await mkdir(join(stand.dataDir, "volumes", "left", "data"), { recursive: true });
    await stand.restart();
    await eventually("gone", () => (existsSync(join(stand.dataDir, "volumes", "left")) ? undefined : true));
  });
});
