import { execFile, spawn } from "node:child_process";
import { once } from "node:events";
import { existsSync } from "node:fs";
import { mkdtemp, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { promisify } from "node:util";
import { ContainerSpec_PullPolicy as Pull } from "@palebluedot/shared/generated/palebluedot/agent/v1/agent.ts";
import { afterEach, beforeEach, describe, expect, test } from "vitest";
import { createImageAccess, type ImageAccess } from "./image-access.ts";
import { createStand, document, eventually, workload } from "./testing/stand.ts";

const run = promisify(execFile);
let dir: string;
beforeEach(async () => {
  dir = await mkdtemp(join(tmpdir(), "pbd-images-"));
});
afterEach(() => rm(dir, { recursive: true, force: true }));

const open = (): Promise<ImageAccess> =>
  createImageAccess(dir, { write: (work) => work(), condition: () => undefined });

describe("who may use an image without pulling it", () => {
  test("one that came with a credential: who pulled it, by any name, also after a restart", async () => {
    const first = await open();
    await first.beginPrivatePull("r/a:1");
    // The agent may die here: the name is closed already.
    expect((await open()).mayUse("a", "r/a:1", "id")).toBe(false);
    await first.pulled("a", "r/a:1", "id", true);
    for (const access of [first, await open()]) {
      expect(access.mayUse("a", "r/a:1", "id")).toBe(true);
      expect(access.mayUse("b", "r/a:1", "id")).toBe(false);
      expect(access.mayUse("b", "r/a@sha256:1", "id")).toBe(false);
      expect(access.mayUse("b", "r/other:1", "other")).toBe(true);
    }
    await first.pulled("b", "r/a:1", "id", false);
    expect((await open()).mayUse("b", "r/a:1", "id")).toBe(true);
  });

  test("a pull that brought nothing closes nothing", async () => {
    const access = await open();
    await access.beginPrivatePull("r/a:1");
    await access.endPrivatePull("r/a:1");
    expect(access.isOpen("r/a:1", "id")).toBe(true);
    await access.pulled("a", "r/a:1", "id", true);
    await access.endPrivatePull("r/a:1");
    expect(access.mayUse("b", "r/a:1", "id")).toBe(false);
  });

  test("unreadable records open nothing", async () => {
    await writeFile(join(dir, "images.json"), "{");
    await expect(open()).rejects.toMatchObject({ code: "image-records-unreadable" });
  });
});

const simulator = fileURLToPath(new URL("../../../simulator/src/main.ts", import.meta.url));

test.skipIf(!existsSync(simulator))(
  "a tenant's private image is not another's, whatever the pull policy",
  { timeout: 60_000 },
  async () => {
    const socket = join(dir, "engine.sock");
    const state = join(dir, "state");
    await run(process.execPath, [simulator, "server", "create", "--state", state, "--count", "2"]);
    const child = spawn(process.execPath, [simulator, "engine", "--state", state, "--socket", socket], {
      stdio: "ignore",
    });
    const exited = once(child, "exit");
    const stand = await createStand({ dockerHost: `unix://${socket}`, gpuUuids: [] });
    try {
      await eventually("the engine's socket", () => (existsSync(socket) ? true : undefined));
      await stand.restart();
      const image = "registry.example/sim/private:1";
      const spec = { image, pullPolicy: Pull.IF_NOT_PRESENT };
      const registry = { server: "registry.example", username: "u", password: "p" };
      const owner = workload("owner", { ...spec, registry });
      await stand.reconciler.setDesired(document(1, [owner]));
      await stand.phase("owner", "RUNNING");
      const others = [
        workload("no-credential", spec, { tenantId: "tenant-b" }),
        workload("never", { ...spec, pullPolicy: Pull.NEVER }, { tenantId: "tenant-b" }),
        workload("again", { ...spec, pullPolicy: Pull.NEVER }),
        workload("own-credential", { ...spec, registry }, { tenantId: "tenant-c" }),
      ];
      await stand.restart();
      await stand.reconciler.setDesired(document(2, [owner, ...others]));
      await stand.phase("again", "RUNNING");
      await stand.phase("own-credential", "RUNNING");
      await stand.phase("never", "FAILED", "image-not-present");
      expect((await stand.phase("no-credential", "FAILED", "image-pull-failed")).message).toContain(
        "unauthorized",
      );
      // An image that everybody may pull stays everybody's.
      const common = { image: "sim/burn", pullPolicy: Pull.IF_NOT_PRESENT };
      await stand.reconciler.setDesired(document(3, [workload("open", common)]));
      await stand.phase("open", "RUNNING");
      const never = { ...common, pullPolicy: Pull.NEVER };
      await stand.reconciler.setDesired(document(4, [workload("open-b", never, { tenantId: "tenant-b" })]));
      await stand.phase("open-b", "RUNNING");
    } finally {
      await stand.close();
      child.kill("SIGTERM");
      await exited;
    }
  },
);
