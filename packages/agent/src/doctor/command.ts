import type { Command } from "commander";
import { errorMessage } from "@palebluedot/shared/errors.ts";
import { createLogger } from "@palebluedot/shared/logger.ts";
import { packagedSettingsFile, settings, type Environment } from "./settings.ts";
import { checks, type CheckResult, type DoctorOptions } from "./checks.ts";

/** Runs every check at once. One that fails by itself is a failed check, not a failed doctor. */
export async function runDoctor(options: DoctorOptions): Promise<readonly CheckResult[]> {
  const results = await Promise.all(
    checks.map(async (check): Promise<readonly CheckResult[]> => {
      try {
        return await check(options);
      } catch (error) {
        return [{ check: check.name, status: "failed", message: errorMessage(error) }];
      }
    }),
  );
  return results.flat();
}

/** `doctor`: what works on this host and what is missing, with remedies. Exit code 1 when a check failed. */
export function registerDoctorCommand(program: Command): void {
  program
    .command("doctor")
    .description("print what works and what is missing on this host, with remedies")
    .option("--json", "print a JSON document")
    .option("--env-file <path>", "settings that are not in the environment", packagedSettingsFile)
    .action(async (flags: { readonly json?: boolean; readonly envFile: string }) => {
      const { env, findings } = await settings(process.env, flags.envFile);
      const results = [...findings, ...(await runDoctor(doctorOptionsFromEnvironment(env)))];
      const bad = results.some((result) => result.status === "failed");
      process.stdout.write(
        flags.json === true
          ? `${JSON.stringify({ ok: !bad, checks: results }, undefined, 2)}\n`
          : results.map(describe).join(""),
      );
      if (bad) process.exitCode = 1;
    });
}

/** The same variables as `run`; unlike there nothing is required, because doctor comes before enrolment. */
export function doctorOptionsFromEnvironment(env: Environment): DoctorOptions {
  return {
    nvidiaSmiPath: env["PALEBLUEDOT_NVIDIA_SMI"] ?? "nvidia-smi",
    kernelLogPath: env["PALEBLUEDOT_KERNEL_LOG"] ?? "/dev/kmsg",
    dataDir: env["PALEBLUEDOT_DATA_DIR"] ?? "/var/lib/palebluedot-agent",
    dockerSocket: (env["DOCKER_HOST"] ?? "unix:///var/run/docker.sock").replace(/^unix:\/\//, ""),
    controller: env["PALEBLUEDOT_CONTROLLER"],
    identityFile: env["PALEBLUEDOT_IDENTITY_FILE"],
    sysfsRoot: env["PALEBLUEDOT_SYSFS_ROOT"] ?? "/sys",
    log: createLogger({ name: "doctor", level: "silent" }),
    deadlineMs: 15_000,
  };
}

function describe(result: CheckResult): string {
  const remedy = result.remedy === undefined ? "" : `\n${" ".repeat(10)}remedy: ${result.remedy}`;
  return `${result.status.padEnd(9)} ${result.check}: ${result.message}${remedy}\n`;
}
