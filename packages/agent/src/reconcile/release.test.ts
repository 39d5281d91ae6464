import { existsSync, readFileSync } from "node:fs";
import { mkdir, rmdir, symlink, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { WorkloadObserved_Phase as Phase } from "@palebluedot/shared/generated/palebluedot/agent/v1/agent.ts";
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, test } from "vitest";
import { forever, script, startEngineFixture } from "./testing/engine-fixture.ts";
import { document, eventually, output, workload, type Stand } from "./testing/stand.ts";

const fixture = await startEngineFixture();

describe.skipIf(fixture.why !== "")(`release on a real Docker Engine${fixture.why}`, () => {
  let stand: Stand;

  beforeAll(() => fixture.prepare());
  afterAll(() => fixture.engine.stop());
  beforeEach(async () => {
    stand = await fixture.open();
  });
  afterEach(() => fixture.close(stand));

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
    expect((await fixture.containers()).map(({ Id }) => Id)).not.toContain(running.containerId);
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

  test("the end of the output is kept, of a container that ended and of one that is stopped", async () => {
    await stand.restart();
    const ends = script(
      "head -c 100000 /dev/zero | tr '\\0' x; echo; sleep 0.2; echo problem >&2; sleep 0.2; echo hello; exit 3",
    );
    const runs = script("echo begun; trap 'echo bye; exit 0' TERM; while :; do sleep 0.1; done");
    await stand.reconciler.setDesired(document(1, [workload("ends", ends), workload("runs", runs)]));
    const exited = await stand.phase("ends", "EXITED");
    expect(exited).toMatchObject({ exitCode: 3 });
    expect(exited.outputTail?.length).toBe(16 * 1024);
    expect(exited.outputTail?.toString()).toMatch(/x\nproblem\nhello\n$/);
    expect((await stand.phase("runs", "RUNNING")).outputTail).toBeUndefined();
    await eventually("it wrote", async () =>
      (await output(stand.reconciler, "runs")).includes("begun") ? true : undefined,
    );
    await stand.reconciler.setDesired(
      document(2, [workload("ends", ends, { reclaimed: true }), workload("runs", runs, { reclaimed: true })]),
    );
    expect(await stand.phase("ends", "CLEAN")).toMatchObject({ exitCode: 3, outputTail: exited.outputTail });
    expect((await stand.phase("runs", "CLEAN")).outputTail?.toString()).toBe("begun\nbye\n");
    // Wanted again, it has written nothing yet.
    await stand.reconciler.setDesired(document(3, [workload("ends", forever)]));
    expect(await stand.phase("ends", "RUNNING")).toMatchObject({
      exitCode: undefined,
      outputTail: undefined,
    });
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

  test("a disk that takes nothing holds up no release, and nothing is started until it does", async () => {
    await stand.restart();
    const [gpu = ""] = stand.gpus.uuids;
    await stand.reconciler.setDesired(
      document(1, [workload("old", forever, { gpuUuids: [gpu] }), workload("dropped", forever)]),
    );
    await stand.phase("old", "RUNNING");
    const dropped = await stand.phase("dropped", "RUNNING");
    // No file can be made where a directory is.
    const obstacle = join(stand.dataDir, "desired.json.new");
    await mkdir(obstacle);
    const next = document(2, [
      workload("old", forever, { gpuUuids: [gpu], reclaimed: true }),
      workload("new", forever, { gpuUuids: [gpu] }),
    ]);
    await expect(stand.reconciler.setDesired(next)).rejects.toMatchObject({
      code: "desired-state-not-stored",
    });
    expect(stand.reconciler.conditions()).toMatchObject([{}, { component: "disk", reason: "not-writable" }]);
    await stand.phase("old", "CLEAN");
    await eventually("the dropped one is gone", async () =>
      (await fixture.containers()).some(({ Id }) => Id === dropped.containerId) ? undefined : true,
    );
    await stand.phase("new", "ACCEPTED", "desired-state-not-stored");
    expect(stand.reconciler.held().generation).toBe(1);
    expect(await fixture.containers()).toEqual([]);

    await rmdir(obstacle);
    await stand.reconciler.setDesired(next);
    await stand.phase("new", "RUNNING");
    expect(stand.reconciler.held().generation).toBe(2);
    expect(stand.reconciler.conditions()).toHaveLength(1);
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
