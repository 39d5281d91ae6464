import { execFile } from "node:child_process";
import { existsSync, readFileSync } from "node:fs";
import { mkdir, mkdtemp, rm, symlink, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { promisify } from "node:util";
import { afterEach, beforeEach, describe, expect, test } from "vitest";
import { createVolumeStore, type VolumeStore } from "./volumes.ts";

const run = promisify(execFile);

describe("removal of an allocation's volumes", () => {
  let dir: string;
  let volumes: VolumeStore;
  beforeEach(async () => {
    dir = await mkdtemp(join(tmpdir(), "pbd-volumes-"));
    volumes = await createVolumeStore(dir);
  });
  afterEach(() => rm(dir, { recursive: true, force: true }));

  test("directories nested deeper than a path can be long", async () => {
    const volume = await volumes.ensure("job", "data");
    const name = "n".repeat(200);
    // As a tenant does it: each directory relative to the last one.
    await run("/bin/sh", [
      "-c",
      'cd "$1"; i=0; while [ $i -lt 60 ]; do mkdir "$2" && cd -P "./$2" && : > file || exit 1; i=$((i+1)); done',
      "sh",
      volume,
      name,
    ]);
    await volumes.remove("job");
    expect(existsSync(join(volumes.root, "job"))).toBe(false);
    await volumes.remove("job");
  });

  test("links are removed and never followed, names need not be text, an interrupted removal goes on", async () => {
    const precious = join(dir, "precious");
    await mkdir(precious);
    await writeFile(join(precious, "file"), "keep me");
    const volume = await volumes.ensure("job", "data");
    await mkdir(join(volume, "a", "b"), { recursive: true });
    for (const path of ["up", "a/up", "a/b/up"]) await symlink(precious, join(volume, path));
    await symlink(precious, join(volumes.root, "job", "link"));
    await writeFile(Buffer.concat([Buffer.from(`${volume}/a/`), Buffer.from([0xff, 0xfe, 0x41])]), "x");
    await mkdir(Buffer.concat([Buffer.from(`${volume}/a/`), Buffer.from([0xff, 0x42])]));
    await mkdir(join(volumes.root, "job", ".removed-0123456789ab-1", "left"), { recursive: true });
    await volumes.ensure("other", "data");
    await volumes.remove("job");
    expect(existsSync(join(volumes.root, "job"))).toBe(false);
    expect(readFileSync(join(precious, "file"), "utf8")).toBe("keep me");
    expect(existsSync(volumes.pathOf("other", "data"))).toBe(true);
  });

  test("an allocation directory that is a link loses the link, not what it points at", async () => {
    const precious = join(dir, "precious");
    await mkdir(precious);
    await symlink(precious, join(volumes.root, "job"));
    await volumes.remove("job");
    expect(existsSync(precious)).toBe(true);
    expect(existsSync(join(volumes.root, "job"))).toBe(false);
  });
});
