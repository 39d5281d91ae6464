/**
 * The process of one simulated container: acts the program out, writes the log, leaves its exit code in a file.
 * Arguments: the container's directory. It outlives the engine, as a container does.
 */
import { appendFileSync, existsSync, readFileSync, renameSync, statSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { expand, programOf, type Step } from "./shell.ts";

interface Work {
  readonly command: readonly string[];
  readonly env: Readonly<Record<string, string>>;
  readonly gpus: readonly { readonly index: number; readonly name: string; readonly uuid: string }[];
}

const dir = process.argv[2] ?? "";
const work = JSON.parse(readFileSync(join(dir, "work.json"), "utf8")) as Work;
const logFile = join(dir, "container.log");
const maximumLogBytes = 10 << 20;

function log(stream: "stdout" | "stderr", text: string): void {
  try {
    if (existsSync(logFile) && statSync(logFile).size > maximumLogBytes) renameSync(logFile, `${logFile}.1`);
    appendFileSync(
      logFile,
      `${JSON.stringify({ stream, time: new Date().toISOString(), log: `${text}\n` })}\n`,
    );
  } catch {
    // The container was removed by force: there is no one to tell.
    process.exit(137);
  }
}

function finish(code: number): never {
  try {
    writeFileSync(join(dir, "exit.json"), JSON.stringify({ code, at: new Date().toISOString() }));
  } catch {
    // Removed meanwhile.
  }
  process.exit(code);
}

for (const [signal, code] of [
  ["SIGTERM", 143],
  ["SIGINT", 130],
  ["SIGHUP", 129],
  ["SIGQUIT", 131],
] as const) {
  process.on(signal, () => {
    if (signal === "SIGTERM" && work.env["SIM_IGNORE_SIGTERM"] === "1") {
      log("stderr", "ignoring SIGTERM");
      return;
    }
    finish(code);
  });
}

// A removed container must not leave its process behind.
setInterval(() => {
  if (!existsSync(dir)) process.exit(137);
}, 1_000).unref();

const sleep = (seconds: number): Promise<void> =>
  new Promise((resolve) => {
    // A timer holds at most 24.8 days; longer ones are slept in pieces by the caller's loop.
    setTimeout(resolve, Math.min(seconds * 1000, 2 ** 31 - 1));
  });

async function step(current: Step): Promise<number> {
  switch (current.kind) {
    case "echo":
      log(current.stderr ? "stderr" : "stdout", expand(current.words.join(" "), work.env));
      return 0;
    case "sleep": {
      let left = current.seconds;
      while (left > 0) {
        const piece = Math.min(left, 86_400);
        await sleep(piece);
        left -= piece;
      }
      return 0;
    }
    case "exit":
      return finish(current.code);
    case "status":
      return current.code;
    case "env":
      for (const [name, value] of Object.entries(work.env)) log("stdout", `${name}=${value}`);
      return 0;
    case "list-gpus":
      for (const [index, gpu] of work.gpus.entries())
        log("stdout", `GPU ${index}: ${gpu.name} (UUID: ${gpu.uuid})`);
      if (work.gpus.length > 0) return 0;
      log("stdout", "No devices were found");
      return 6;
    default:
      throw new Error("unknown step");
  }
}

async function burn(): Promise<never> {
  log("stdout", `training on ${work.gpus.length} GPU(s)`);
  for (const gpu of work.gpus) log("stdout", `using ${gpu.name} ${gpu.uuid}`);
  const startedMs = Date.now();
  for (let count = 1; ; count++) {
    await sleep(1);
    const seconds = (Date.now() - startedMs) / 1000;
    const loss = 0.4 + 3 * Math.exp(-seconds / 300);
    const tokens = work.gpus.length * 11_800 * (1 + 0.02 * Math.sin(count));
    log(
      "stdout",
      `step ${count} loss ${loss.toFixed(4)} lr ${(3e-4).toExponential(1)} tokens/s ${Math.round(tokens)}`,
    );
    if (count % 30 === 0) log("stderr", `checkpoint written at step ${count}`);
  }
}

const program = programOf(work.command);
if (program.kind === "burn") await burn();
if (program.kind === "ticker") {
  log(
    "stdout",
    `${program.name}: this engine is simulated and acts out a log; nothing of the image is executed`,
  );
  for (let count = 1; ; count++) {
    await sleep(1);
    log("stdout", `tick ${count}`);
  }
}
if (program.kind === "script") {
  let code = 0;
  do {
    for (const current of program.steps) code = await step(current);
  } while (program.forever);
  finish(code);
}
