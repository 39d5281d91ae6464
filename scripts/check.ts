/**
 * Everything that must hold before a change lands: `npm run check [-- --no-tests]`. All parts run, also
 * after one failed, so that one run names every fault.
 */
import { readFileSync, readdirSync } from "node:fs";
import { execa } from "execa";

const root = new URL("../", import.meta.url);

/** Stands for "generated code is what proto/ says": generate into a scratch folder and compare. */
async function generatedIsCurrent(): Promise<void> {
  const before = new Map(generatedFiles());
  await execa("buf", ["generate"], { cwd: root, preferLocal: true });
  const stale = generatedFiles().filter(([path, text]) => before.get(path) !== text);
  if (stale.length > 0)
    throw new Error(`generated code was stale, commit the new: ${stale.map(([p]) => p).join(", ")}`);
}

function generatedFiles(): [path: string, text: string][] {
  const dir = new URL("packages/shared/src/generated/", root);
  return readdirSync(dir, { recursive: true, withFileTypes: true })
    .filter((entry) => entry.isFile())
    .map((entry) => `${entry.parentPath}/${entry.name}`)
    .map((path) => [path, readFileSync(path, "utf8")]);
}

function run(command: string, ...args: string[]): () => Promise<void> {
  return async () => {
    await execa(command, args, { cwd: root, preferLocal: true, stdio: "inherit" });
  };
}

const steps: [name: string, step: () => Promise<void>][] = [
  ["types", run("tsc", "-p", ".")],
  ["lint", run("oxlint", "--type-aware", "--deny-warnings")],
  ["format", run("oxfmt", "--check")],
  ["dead code", run("knip")],
  ["wire contract: lint", run("buf", "lint")],
  ["wire contract: breaking", run("buf", "breaking", "--against", "proto/released/latest.binpb")],
  ["wire contract: generated code", generatedIsCurrent],
];
if (!process.argv.includes("--no-tests")) steps.push(["tests", run("npm", "test")]);

const failed: string[] = [];
for (const [name, step] of steps) {
  process.stderr.write(`\n== ${name}\n`);
  const startedAt = Date.now();
  try {
    await step();
    process.stderr.write(`== ${name}: ok (${((Date.now() - startedAt) / 1000).toFixed(1)} s)\n`);
  } catch (error) {
    failed.push(name);
    process.stderr.write(
      `== ${name}: FAILED (${error instanceof Error ? error.message.split("\n")[0] : String(error)})\n`,
    );
  }
}
if (failed.length > 0) {
  process.stderr.write(`\nFailed: ${failed.join(", ")}\n`);
  process.exit(1);
}
