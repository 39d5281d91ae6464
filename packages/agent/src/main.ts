#!/usr/bin/env node
import { Command } from "commander";
import { isPlatformError } from "@palebluedot/shared/errors.ts";
import { createLogger } from "@palebluedot/shared/logger.ts";
import { loadConfig, type SettingName } from "./config/config.ts";
import { registerDoctorCommand } from "./doctor/command.ts";
import { registerInspectCommand } from "./inspect/command.ts";
import { agentVersion } from "./version.ts";

/** Flags of `run` and the settings they stand for. There is none for a secret's value. */
const flags: readonly (readonly [flag: string, setting: SettingName, description: string])[] = [
  ["--controller <host:port>", "PALEBLUEDOT_CONTROLLER", "the controller's enrolment address"],
  ["--ca-fingerprint <sha256>", "PALEBLUEDOT_CA_FINGERPRINT", "SHA-256 of the controller's CA certificate"],
  ["--join-token-file <file>", "PALEBLUEDOT_JOIN_TOKEN_FILE", "file that holds the join token"],
  ["--data-dir <directory>", "PALEBLUEDOT_DATA_DIR", "where the agent keeps its state"],
  ["--nvidia-smi <path>", "PALEBLUEDOT_NVIDIA_SMI", "nvidia-smi, if it is not in PATH"],
  ["--kernel-log <path>", "PALEBLUEDOT_KERNEL_LOG", 'kernel log to read Xids from, or "none"'],
  ["--metrics-port <port>", "PALEBLUEDOT_METRICS_PORT", "serve /metrics and /healthz on this port"],
  ["--telemetry-interval-ms <ms>", "PALEBLUEDOT_TELEMETRY_INTERVAL_MS", "1000 to 600000"],
];

function optionName(flag: string): string {
  return flag.replace(/^--| .*$/g, "").replace(/-([a-z])/g, (_match, letter: string) => letter.toUpperCase());
}

async function run(options: Readonly<Record<string, string | undefined>>): Promise<void> {
  const given: Partial<Record<SettingName, string>> = {};
  for (const [flag, setting] of flags) {
    const value = options[optionName(flag)];
    if (value !== undefined) given[setting] = value;
  }
  const config = loadConfig(process.env, given);
  const log = createLogger({ name: "palebluedot-agent", level: config.PALEBLUEDOT_LOG_LEVEL });
  const abort = new AbortController();
  for (const name of ["SIGTERM", "SIGINT"] as const) {
    process.once(name, () => {
      log.info({ signal: name }, "stopping; containers keep running");
      abort.abort(new Error(`stopped by ${name}`));
      // A part that does not end must not keep systemd waiting.
      setTimeout(() => process.exit(0), 10_000).unref();
    });
  }
  // Imported late: `inspect` and `version` need none of it.
  const { runAgent } = await import("./run.ts");
  await runAgent(config, log, abort.signal);
  process.exit(0);
}

const program = new Command("palebluedot-agent")
  .description("GPU server agent: reports what the server is, runs tenants' containers on its GPUs")
  .version(agentVersion);

const runCommand = program
  .command("run", { isDefault: true })
  .description("enrol this host and serve it; settings come from the environment (PALEBLUEDOT_*), flags win");
for (const [flag, setting, description] of flags) runCommand.option(flag, `${description} (${setting})`);
runCommand.action(run);

registerInspectCommand(program);
registerDoctorCommand(program);
program
  .command("version")
  .description("print the version")
  .action(() => {
    process.stdout.write(`${agentVersion}\n`);
  });

try {
  await program.parseAsync();
} catch (error) {
  if (!isPlatformError(error)) throw error;
  process.stderr.write(
    `${error.code}: ${error.message}\n${error.hint === undefined ? "" : `${error.hint}\n`}`,
  );
  process.exitCode = error.kind === "invalid" ? 2 : 1;
}
