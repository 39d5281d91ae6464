import { readFileSync } from "node:fs";
import { type Command, InvalidArgumentError } from "commander";
import { startFleet } from "./fleet.ts";

function count(max: number): (text: string) => number {
  return (text) => {
    const value = Number(text);
    if (!Number.isInteger(value) || value < 1 || value > max) {
      throw new InvalidArgumentError(`must be a whole number from 1 to ${max}`);
    }
    return value;
  };
}

interface FleetArguments {
  readonly controller: string;
  readonly caFingerprint: string;
  readonly joinTokenFile: string;
  readonly agents: number;
  readonly gpus: number;
  readonly telemetryIntervalMs: number;
  readonly seed: number;
}

/** `fleet`: agents without hosts, for load tests. One JSON line a second on standard output. */
export function registerFleetCommand(program: Command): void {
  program
    .command("fleet")
    .description("hold many agent sessions in one process, over real mutual TLS")
    .requiredOption("--controller <host:port>", "the controller's enrolment address")
    .requiredOption("--ca-fingerprint <sha256>", "SHA-256 of the controller's CA certificate")
    .requiredOption("--join-token-file <file>", "file with an auto-approving token of enough uses")
    .option("--agents <n>", "agents", count(50_000), 100)
    .option("--gpus <n>", "GPUs per server", count(64), 8)
    .option("--telemetry-interval-ms <ms>", "between samples", count(600_000), 10_000)
    .option("--seed <n>", "sets this fleet apart from others", count(1_000_000), 1)
    .action(async (args: FleetArguments) => {
      const fleet = await startFleet({
        controller: args.controller,
        caFingerprint: args.caFingerprint,
        joinToken: readFileSync(args.joinTokenFile, "utf8").trim(),
        agents: args.agents,
        gpusPerServer: args.gpus,
        telemetryIntervalMs: args.telemetryIntervalMs,
        seed: args.seed,
        onError: (message) => process.stderr.write(`${message}\n`),
      });
      const report = setInterval(() => {
        process.stdout.write(`${JSON.stringify(fleet.statistics())}\n`);
      }, 1000);
      await new Promise<void>((resolve) => {
        process.once("SIGINT", resolve);
        process.once("SIGTERM", resolve);
      });
      clearInterval(report);
      await fleet.stop();
    });
}
