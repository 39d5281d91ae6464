import { execFileSync, spawn } from "node:child_process";
import { once } from "node:events";
import { existsSync } from "node:fs";
import { chmod, cp, mkdir, mkdtemp, readFile, readdir, rm, stat, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { createInterface } from "node:readline";
import { fileURLToPath } from "node:url";
import { nodeFlags } from "@palebluedot/shared/node-flags.ts";
import { execa } from "execa";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { z } from "zod";
import { buildPackage, packageNames, type BuiltPackage, type PackageName } from "./build.ts";

const installers = fileURLToPath(new URL(".", import.meta.url));

function installed(program: string): boolean {
  try {
    execFileSync("which", [program], { stdio: "ignore" });
    return true;
  } catch {
    return false;
  }
}

const canBuild = process.platform === "linux" && process.arch === "x64" && installed("dpkg-deb");

const run = (args: readonly string[]) =>
  execa("sh", [join(installers, "install.sh"), ...args], { reject: false, timeout: 120_000 });

/** Without a Node on PATH: what runs is what the package ships. */
const cleanEnvironment = { PATH: "/nonexistent:/usr/sbin:/usr/bin:/sbin:/bin", HOME: "/nonexistent" };

describe.skipIf(!canBuild)("packages (needs dpkg-deb on Linux x64)", () => {
  let directory: string;
  const built = {} as Record<PackageName, BuiltPackage>;
  const unpacked = {} as Record<PackageName, string>;

  beforeAll(async () => {
    directory = await mkdtemp(join(tmpdir(), "palebluedot-installers-"));
    // An unprivileged user must be able to run what is unpacked here.
    await chmod(directory, 0o755);
    for (const name of packageNames) {
      built[name] = await buildPackage(name, join(directory, "out"));
      unpacked[name] = join(directory, name);
      await mkdir(unpacked[name]);
      await execa("dpkg-deb", ["--extract", built[name].file, unpacked[name]], { timeout: 120_000 });
    }
  }, 600_000);
  afterAll(async () => {
    await rm(directory, { recursive: true, force: true });
  });

  test.each(packageNames)("%s: fields, scripts and modes", async (name) => {
    const { stdout: control } = await execa("dpkg-deb", ["--field", built[name].file]);
    expect(control).toContain(`Package: palebluedot-${name}\n`);
    expect(control).toContain("Architecture: amd64");
    const { stdout: contents } = await execa("dpkg-deb", ["--contents", built[name].file]);
    const lines = contents.split("\n");
    // Nothing belongs to the builder, and nothing is writable by others.
    expect(lines.filter((line) => !line.includes(" root/root "))).toEqual([]);
    expect(lines.filter((line) => /^-.{4}w|^-.{7}w/.test(line))).toEqual([]);
    expect(contents).toMatch(new RegExp(`-rw------- .* \\./etc/palebluedot/${name}\\.env`));
    expect(contents).toMatch(
      new RegExp(`-rw-r--r-- .* \\./lib/systemd/system/palebluedot-${name}\\.service`),
    );
    const scripts = join(directory, `${name}-control`);
    await execa("dpkg-deb", ["--control", built[name].file, scripts]);
    expect((await readdir(scripts)).sort()).toEqual(["conffiles", "control", "postinst", "postrm", "prerm"]);
    expect(await readFile(join(scripts, "conffiles"), "utf8")).toBe(`/etc/palebluedot/${name}.env\n`);
  });

  test.each(packageNames)("%s: no path of the build machine is in the bundle", async (name) => {
    const library = join(unpacked[name], "usr/lib", `palebluedot-${name}`);
    const bundle = await readFile(join(library, `${name}.mjs`), "utf8");
    expect(bundle).not.toContain(fileURLToPath(new URL("..", import.meta.url)));
  });

  test.each(packageNames)("%s: the unit starts the program that carries Node's flags", async (name) => {
    const full = `palebluedot-${name}`;
    const unit = await readFile(join(unpacked[name], "lib/systemd/system", `${full}.service`), "utf8");
    expect(unit).toMatch(new RegExp(`^ExecStart=(.* )?/usr/bin/${full} run$`, "m"));
    const program = await readFile(join(unpacked[name], "usr/bin", full), "utf8");
    expect(nodeFlags[name].length).toBeGreaterThan(0);
    expect(program).toContain(` ${nodeFlags[name].join(" ")} `);
  });

  test("the agent runs with the Node that it ships", async () => {
    const agent = join(unpacked.agent, "usr/bin/palebluedot-agent");
    const version = await execa(agent, ["version"], {
      env: cleanEnvironment,
      extendEnv: false,
      timeout: 30_000,
    });
    expect(version.stdout).toContain(built.agent.version);
    const doctor = await execa(agent, ["doctor", "--json"], {
      env: { ...cleanEnvironment, PALEBLUEDOT_DATA_DIR: join(directory, "agent-data") },
      extendEnv: false,
      reject: false,
      timeout: 60_000,
    });
    // A host without GPUs has findings, which are a result and not a crash.
    expect([0, 1]).toContain(doctor.exitCode);
    expect(JSON.parse(doctor.stdout)).toBeTypeOf("object");
  });

  test("the controller starts alone, with its own PostgreSQL, and pbd speaks to it", async () => {
    const programs = join(unpacked.controller, "usr/bin");
    const environment = {
      ...cleanEnvironment,
      PALEBLUEDOT_DATA_DIR: join(directory, "controller-data"),
      SERVER_PORT: "0",
      PALEBLUEDOT_AGENT_HOST: "127.0.0.1",
      PALEBLUEDOT_ENROLMENT_PORT: "0",
      PALEBLUEDOT_AGENT_PORT: "0",
      PALEBLUEDOT_LOG_LEVEL: "warn",
    };
    const help = await execa(join(programs, "palebluedot-controller"), ["--help"], {
      env: cleanEnvironment,
      extendEnv: false,
      timeout: 30_000,
    });
    expect(help.stdout).toContain("Usage: palebluedot-controller");
    const controller = spawn(join(programs, "palebluedot-controller"), ["run"], {
      env: environment,
      stdio: ["ignore", "pipe", "inherit"],
    });
    try {
      const [line] = (await once(createInterface({ input: controller.stdout }), "line", {
        signal: AbortSignal.timeout(90_000),
      })) as [string];
      const ready = z.object({ url: z.string(), admin_token_file: z.string() }).parse(JSON.parse(line));
      const capacity = await execa(join(programs, "pbd"), ["capacity", "-o", "json"], {
        env: {
          ...cleanEnvironment,
          PALEBLUEDOT_URL: ready.url,
          PALEBLUEDOT_TOKEN_FILE: ready.admin_token_file,
        },
        extendEnv: false,
        timeout: 30_000,
      });
      expect(JSON.parse(capacity.stdout)).toEqual({ items: [] });
    } finally {
      controller.kill("SIGTERM");
      if (controller.exitCode === null) await once(controller, "exit");
    }
    expect(controller.exitCode).toBe(0);
  }, 180_000);

  describe("install.sh", () => {
    const fingerprint = "AB".repeat(32);
    let root: string;
    let tokenFile: string;

    beforeAll(async () => {
      root = join(directory, "root");
      await mkdir(root);
      tokenFile = join(directory, "token");
      await writeFile(tokenFile, "pbj_the-token\n");
    });

    const complete = (): string[] => [
      "--controller",
      "https://controller.example:8443",
      "--token-file",
      tokenFile,
      "--ca-fingerprint",
      fingerprint,
      "--package",
      built.agent.file,
      "--root",
      root,
    ];

    test("configures an image; a second run changes nothing, a third only what differs", async () => {
      const first = await run(complete());
      expect(first).toMatchObject({ exitCode: 0, stdout: "" });
      const configuration = join(root, "etc/palebluedot/agent.env");
      const token = join(root, "etc/palebluedot/join-token");
      const written = await readFile(configuration, "utf8");
      expect(written).toContain("PALEBLUEDOT_CONTROLLER=controller.example:8443\n");
      expect(written).toContain(`PALEBLUEDOT_CA_FINGERPRINT=${"ab".repeat(32)}\n`);
      expect(written).not.toContain("pbj_the-token");
      expect(await readFile(token, "utf8")).toBe("pbj_the-token\n");
      for (const file of [configuration, token]) expect((await stat(file)).mode & 0o777).toBe(0o600);
      expect(existsSync(join(root, "usr/lib/palebluedot-agent/node"))).toBe(true);

      await writeFile(configuration, `${written}PALEBLUEDOT_METRICS_PORT=9400\n`);
      expect((await run(complete())).exitCode).toBe(0);
      expect(await readFile(configuration, "utf8")).toBe(`${written}PALEBLUEDOT_METRICS_PORT=9400\n`);

      const moved = complete().map((word) => word.replace("controller.example", "[2001:db8::1]"));
      expect((await run(moved)).exitCode).toBe(0);
      expect(await readFile(configuration, "utf8")).toBe(
        `${written.replace("controller.example", "[2001:db8::1]")}PALEBLUEDOT_METRICS_PORT=9400\n`,
      );
      expect((await readdir(join(root, "etc/palebluedot"))).sort()).toEqual(["agent.env", "join-token"]);
    });

    test.each([
      ["nothing", () => []],
      ["an unknown flag", () => [...complete(), "--token", "pbj_x"]],
      ["a flag without its value", () => ["--controller"]],
      ["no port", () => complete().map((word) => word.replace(":8443", ""))],
      ["a port that is none", () => complete().map((word) => word.replace("8443", "84430"))],
      ["an address with a space", () => complete().map((word) => word.replace("controller", "a b"))],
      ["an address with a line break", () => complete().map((word) => word.replace("controller", "a\nX=1"))],
      ["bare IPv6", () => complete().map((word) => word.replace("controller.example", "2001:db8::1"))],
      ["a short fingerprint", () => complete().map((word) => word.replace("ABAB", ""))],
      ["a fingerprint of other letters", () => complete().map((word) => word.replace("ABAB", "XYXY"))],
      ["a missing token file", () => complete().map((word) => (word === tokenFile ? "/nonexistent" : word))],
      [
        "a token file with more in it",
        () => complete().map((word) => (word === tokenFile ? "/etc/passwd" : word)),
      ],
      [
        "a missing package",
        () => complete().map((word) => (word === built.agent.file ? "/nonexistent" : word)),
      ],
    ])("%s is refused and nothing is written", async (_name, args) => {
      const before = await readdir(root, { recursive: true });
      const result = await run(args());
      expect(result).toMatchObject({ exitCode: 2, stdout: "" });
      expect(result.stderr).toContain("install.sh: ");
      expect(await readdir(root, { recursive: true })).toEqual(before);
    });

    test("another package is refused", async () => {
      const result = await run(
        complete().map((word) => (word === built.agent.file ? built.controller.file : word)),
      );
      expect(result.exitCode).toBe(1);
      expect(result.stderr).toContain("not palebluedot-agent");
    });
  });

  describe.skipIf(!installed("systemd-analyze"))("units (needs systemd-analyze)", () => {
    test.each(packageNames)("%s", async (name) => {
      // The unit names files of an installed package: stand-ins make the check about everything else.
      const text = await readFile(join(installers, "debian", name, `palebluedot-${name}.service`), "utf8");
      const unit = join(directory, `palebluedot-${name}.service`);
      await writeFile(
        unit,
        text
          .replaceAll(`/usr/bin/palebluedot-${name}`, "/bin/true")
          .replace(/^EnvironmentFile=.*$/m, "EnvironmentFile=-/nonexistent"),
      );
      const result = await execa("systemd-analyze", ["verify", "--man=no", unit], {
        all: true,
        reject: false,
      });
      expect(result).toMatchObject({ exitCode: 0, all: "" });
    });
  });
});

test.skipIf(!installed("shellcheck"))("shell scripts (needs shellcheck)", async () => {
  const directory = await mkdtemp(join(tmpdir(), "palebluedot-shellcheck-"));
  try {
    await cp(installers, directory, { recursive: true });
    const scripts = packageNames.flatMap((name) =>
      ["postinst", "prerm", "postrm"].map((script) => join("debian", name, script)),
    );
    const result = await execa("shellcheck", ["install.sh", ...scripts], {
      cwd: directory,
      all: true,
      reject: false,
    });
    expect(result).toMatchObject({ exitCode: 0, all: "" });
  } finally {
    await rm(directory, { recursive: true, force: true });
  }
});
