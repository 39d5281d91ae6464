// Runs before `npm run demo` and `npm test`, under whatever Node started npm: installs the locked
// dependencies when they are missing or older than the lock file. Plain JavaScript without imports of
// ours, since nothing is installed yet.
import { spawnSync } from "node:child_process";
import { createHash } from "node:crypto";
import { existsSync, readFileSync, writeFileSync } from "node:fs";

const root = new URL("../", import.meta.url);
const marker = new URL("node_modules/.palebluedot-lock", root);
const lock = createHash("sha256")
  .update(readFileSync(new URL("package-lock.json", root)))
  .digest("hex");

if (!existsSync(marker) || readFileSync(marker, "utf8") !== lock) {
  process.stderr.write("Installing dependencies (npm ci) ...\n");
  // npm says where its own program is; under another runner, `npm` on PATH has to do.
  const npm = process.env.npm_execpath;
  const [command, args] = npm?.endsWith(".js") ? [process.execPath, [npm, "ci"]] : ["npm", ["ci"]];
  const result = spawnSync(command, args, { cwd: root, stdio: ["ignore", 2, 2] });
  if (result.status !== 0) {
    process.stderr.write("npm ci failed: is the npm registry reachable?\n");
    process.exit(result.status ?? 1);
  }
  writeFileSync(marker, lock);
}

const pinned = new URL("node_modules/.bin/node", root);
if (!existsSync(pinned) && Number(process.versions.node.split(".")[0]) < 24) {
  process.stderr.write(
    `Node 24 is needed and npm carries none for ${process.platform}-${process.arch}; this is ${process.version}. Install Node 24 and try again.\n`,
  );
  process.exit(1);
}
