/** What the person at the terminal sees. */
const bold = (text: string): string => (process.stdout.isTTY ? `\u001b[1m${text}\u001b[0m` : text);
const green = (text: string): string => (process.stdout.isTTY ? `\u001b[32m${text}\u001b[0m` : text);
const red = (text: string): string => (process.stdout.isTTY ? `\u001b[31m${text}\u001b[0m` : text);

export function heading(text: string): void {
  process.stdout.write(`\n${bold(text)}\n`);
}

export function line(text: string): void {
  process.stdout.write(`  ${text}\n`);
}

/** Runs one step and prints its outcome with the time it took. */
export async function step<T>(what: string, run: () => Promise<T>, tell?: (result: T) => string): Promise<T> {
  const startedAt = performance.now();
  if (process.stdout.isTTY) process.stdout.write(`  … ${what}\r`);
  const took = (): string => `${((performance.now() - startedAt) / 1000).toFixed(1)} s`;
  try {
    const result = await run();
    const told = tell?.(result);
    process.stdout.write(`  ${green("✔")} ${what}${told === undefined ? "" : `: ${told}`} (${took()})\n`);
    return result;
  } catch (error) {
    process.stdout.write(`  ${red("✘")} ${what} (${took()})\n`);
    throw error;
  }
}
