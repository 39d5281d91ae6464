/**
 * Node's flags of the programs that run for long, for whoever starts them: packages, tests and benchmarks. The
 * script `controller` in the root package.json carries them, too.
 *
 * The agent shares its server with tenants who pay for the memory: it works a few milliseconds a second, so what
 * the optimising compilers, their code and a roomy young generation cost is never earned back (`npm run bench --
 * agent --node-flags=...` compares). The controller's many small messages die young: with a bounded young
 * generation a fleet costs it a quarter less memory and no more time (`npm run bench -- fleet`).
 */
export const nodeFlags: Readonly<Record<"agent" | "controller", readonly string[]>> = {
  agent: ["--max-semi-space-size=1", "--optimize-for-size", "--v8-pool-size=1", "--no-opt", "--no-maglev"],
  controller: ["--max-semi-space-size=8"],
};
