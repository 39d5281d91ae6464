import { readFileSync } from "node:fs";
import { readdir, stat } from "node:fs/promises";
import { cpus, totalmem } from "node:os";
import { join } from "node:path";
import {
  ContainerSpec_RestartPolicy as Restart,
  LogChunk_Stream,
  WorkloadObserved_Phase as Phase,
} from "@palebluedot/shared/generated/palebluedot/agent/v1/agent.ts";
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, test } from "vitest";
import { forever, script, startEngineFixture } from "./testing/engine-fixture.ts";
import { document, eventually, output, workload, type Stand } from "./testing/stand.ts";

const fixture = await startEngineFixture();

describe.skipIf(fixture.why !== "")(`containers on a real Docker Engine${fixture.why}`, () => {
  let stand: Stand;

  beforeAll(() => fixture.prepare());
  afterAll(() => fixture.engine.stop());
  beforeEach(async () => {
    stand = await fixture.open();
  });
  afterEach(() => fixture.close(stand));

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
    const forged = (await fixture.containers()).filter(
      (one) => one.Labels["palebluedot.allocation"] === "forged",
    );
    expect(forged).toEqual([]);
  });

  test("a container can neither send raw packets nor make device nodes", async () => {
    await stand.restart();
    await stand.reconciler.setDesired(
      document(1, [workload("caps", script("grep CapEff /proc/self/status; mknod /tmp/n c 1 3 || echo no"))]),
    );
    await stand.phase("caps", "EXITED");
    const text = await output(stand.reconciler, "caps");
    const effective = BigInt(`0x${/CapEff:\s*([0-9a-f]+)/.exec(text)?.[1] ?? "0"}`);
    expect(effective).not.toBe(0n);
    // NET_RAW is 13, MKNOD 27, AUDIT_WRITE 29.
    for (const bit of [13n, 27n, 29n]) expect((effective >> bit) & 1n).toBe(0n);
    expect(text).toContain("no\n");
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
    const { HostConfig } = await fixture.inspect(seen.containerId);
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

  test("a container that asks for no limits gets its GPUs' share of the host", async () => {
    await stand.restart();
    const [gpu = ""] = stand.gpus.uuids;
    await stand.reconciler.setDesired(
      document(1, [workload("modest", script("exit 0"), { gpuUuids: [gpu] })]),
    );
    const { containerId } = await stand.phase("modest", "EXITED");
    const { HostConfig } = await fixture.inspect(containerId);
    // One of four GPUs.
    const memory = Number(HostConfig["Memory"]);
    expect(memory).toBeGreaterThan(totalmem() * 0.2);
    expect(memory).toBeLessThanOrEqual(totalmem() / 4);
    expect(HostConfig["MemorySwap"]).toBe(memory);
    expect(HostConfig["NanoCpus"]).toBe((cpus().length / 4) * 1e9);
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
    expect((await fixture.containers()).map(({ Id }) => Id)).toEqual([second.containerId]);
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
});
