import { mkdtemp, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { systemClock } from "@palebluedot/shared/clock.ts";
import { createLogger } from "@palebluedot/shared/logger.ts";
import { afterEach, beforeEach, expect, test } from "vitest";
import { findHolders, type Holders } from "./holders.ts";
import { loadIdleMemory } from "./idle-memory.ts";
import { readSmiDocument } from "./smi-document.ts";
import { createSmiRunner } from "./smi-runner.ts";

const uuid = "GPU-11111111-2222-3333-4444-555555555555";
let dir: string;
beforeEach(async () => {
  dir = await mkdtemp(join(tmpdir(), "pbd-holders-"));
});
afterEach(() => rm(dir, { recursive: true, force: true }));

/** An nvidia-smi whose list of compute processes is empty, and whose document says what is given. */
async function look(processes: string): Promise<Holders> {
  const path = join(dir, "nvidia-smi");
  const document = `<?xml version="1.0" ?><nvidia_smi_log><driver_version>580.65.06</driver_version><attached_gpus>1</attached_gpus><gpu id="00000000:01:00.0"><uuid>${uuid}</uuid><product_name>NVIDIA L40S</product_name>${processes}</gpu></nvidia_smi_log>`;
  const script = `#!/bin/sh\ncase "$*" in *compute-apps*) ;; *--query-gpu*) echo '0, ${uuid}, 3, 46068';; *) cat <<'END'\n${document}\nEND\n;; esac\n`;
  await writeFile(path, script, { mode: 0o755 });
  const runner = createSmiRunner({
    path,
    env: process.env,
    clock: systemClock,
    log: createLogger({ name: "test", level: "silent" }),
  });
  try {
    return await findHolders([uuid], {
      runner,
      idle: await loadIdleMemory(undefined),
      deadlineMs: 10_000,
      document: (uuids) => readSmiDocument(runner, 10_000, uuids),
    });
  } finally {
    await runner.stop();
  }
}

test("a graphics process, which only the document lists, holds its GPU", async () => {
  const process =
    "<process_info><pid>4711</pid><type>G</type><process_name>Xorg</process_name><used_memory>4 MiB</used_memory></process_info>";
  expect(await look(`<processes>${process}</processes>`)).toMatchObject({
    kind: "known",
    holders: [{ gpuUuid: uuid, pid: 4711, processName: "Xorg", memoryUsedBytes: 4 * 1024 * 1024 }],
  });
});

test("no process in the list and none in the document: nothing holds it", async () => {
  expect(await look("<processes></processes>")).toEqual({ kind: "known", holders: [] });
});

test("a document that does not tell about processes is no proof that there are none", async () => {
  expect(await look("")).toMatchObject({ kind: "unknown" });
});
