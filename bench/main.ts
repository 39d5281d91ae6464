/**
 * `npm run bench -- NAME [options]`. One JSON object a line on standard output: {bench, name, value, unit, ...};
 * progress goes to standard error. Nothing here passes or fails: it measures.
 */
import { agentBench } from "./agent.ts";
import { allocationBench } from "./allocation.ts";
import { fleetBench } from "./fleet.ts";

export interface Bench {
  readonly summary: string;
  run(args: readonly string[]): Promise<void>;
}

const benches: Readonly<Record<string, Bench>> = {
  agent: agentBench,
  fleet: fleetBench,
  allocation: allocationBench,
};

const [name, ...args] = process.argv.slice(2);
const bench = name === undefined ? undefined : benches[name];
if (bench === undefined) {
  process.stderr.write("usage: npm run bench -- NAME [options]\n");
  for (const [known, { summary }] of Object.entries(benches))
    process.stderr.write(`  ${known.padEnd(12)} ${summary}\n`);
  process.exit(2);
}
await bench.run(args);
// Sessions and pools of a measured fleet are not worth an orderly goodbye.
process.exit(0);
