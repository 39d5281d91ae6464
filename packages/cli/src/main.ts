#!/usr/bin/env node
import { PassThrough } from "node:stream";
import { createInterface } from "node:readline/promises";
import { readStream, runProgram } from "./program.ts";

const interrupt = new AbortController();
process.once("SIGINT", () => interrupt.abort());
process.once("SIGTERM", () => interrupt.abort());
// `pbd ... | head` closes our output: that is not a failure.
process.stdout.on("error", (error: NodeJS.ErrnoException) => {
  if (error.code === "EPIPE") process.exit(0);
  throw error;
});

async function promptHidden(question: string): Promise<string> {
  process.stderr.write(question);
  // The terminal echoes through readline's output, which goes nowhere here.
  const prompt = createInterface({ input: process.stdin, output: new PassThrough(), terminal: true });
  try {
    return await prompt.question("", { signal: interrupt.signal });
  } finally {
    prompt.close();
    process.stderr.write("\n");
  }
}

process.exitCode = await runProgram(process.argv.slice(2), {
  stdout: process.stdout,
  stderr: process.stderr,
  env: process.env,
  readInput: () => readStream(process.stdin),
  promptHidden: process.stdin.isTTY ? promptHidden : undefined,
  signal: interrupt.signal,
});
