// `node scripts/complete-lock.mjs` after a change of dependencies: a registry mirror may lack the builds of a
// package for other platforms, npm then leaves them out of package-lock.json, and `npm ci` refuses such a lock
// file everywhere. This adds the missing entries (name, exact version, platform), as a complete registry
// would have given them; `npm ci` fetches only what fits the machine.
import { readFileSync, writeFileSync } from "node:fs";

const file = new URL("../package-lock.json", import.meta.url);
const lock = JSON.parse(readFileSync(file, "utf8"));

const systems = [
  "darwin",
  "linux",
  "win32",
  "freebsd",
  "netbsd",
  "openbsd",
  "android",
  "openharmony",
  "sunos",
  "aix",
];
const processors = {
  aarch64: "arm64",
  arm64: "arm64",
  x64: "x64",
  armv7: "arm",
  gnueabihf: "arm",
  musleabihf: "arm",
  eabi: "arm",
  arm: "arm",
  ia32: "ia32",
  ppc64: "ppc64",
  riscv64: "riscv64",
  s390x: "s390x",
  loong64: "loong64",
  mips64el: "mips64el",
  wasm32: "wasm32",
  universal: undefined,
};

let added = 0;
for (const [path, entry] of Object.entries(lock.packages)) {
  for (const [name, version] of Object.entries(entry.optionalDependencies ?? {})) {
    // Only exact versions: a range says nothing of what a registry would choose.
    if (!/^\d+\.\d+\.\d+(-[\w.]+)?$/.test(version)) continue;
    const nested = path === "" ? undefined : `${path}/node_modules/${name}`;
    const hoisted = lock.packages[`node_modules/${name}`];
    if (hoisted?.version === version || (nested !== undefined && lock.packages[nested] !== undefined))
      continue;
    const words = name.split(/[/-]/);
    const cpu = words.map((word) => processors[word]).find((word) => word !== undefined);
    const os = words.find((word) => systems.includes(word));
    if (cpu === undefined && os === undefined) continue;
    lock.packages[hoisted === undefined ? `node_modules/${name}` : nested] = {
      version,
      ...(cpu === undefined ? {} : { cpu: [cpu] }),
      ...(entry.dev ? { dev: true } : {}),
      optional: true,
      ...(os === undefined ? {} : { os: [os] }),
    };
    added += 1;
  }
}
lock.packages = Object.fromEntries(Object.entries(lock.packages).sort(([a], [b]) => (a < b ? -1 : 1)));
writeFileSync(file, `${JSON.stringify(lock, null, 2)}\n`);
process.stderr.write(`${added} entries added\n`);
