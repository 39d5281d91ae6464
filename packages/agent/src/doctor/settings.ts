import { readFile } from "node:fs/promises";
import { errorMessage } from "@palebluedot/shared/errors.ts";
import type { CheckResult } from "./checks.ts";

/** Where the package keeps the agent's settings; systemd reads it for the service, nobody does for a shell. */
export const packagedSettingsFile = "/etc/palebluedot/agent.env";

export type Environment = Readonly<Record<string, string | undefined>>;

/**
 * The settings that the service runs with, as far as this process was not given its own: variables that are set
 * win over the file. A host without the package has none; a file that cannot be read is a finding.
 */
export async function settings(
  env: Environment,
  file: string,
): Promise<{ readonly env: Environment; readonly findings: readonly CheckResult[] }> {
  try {
    return { env: { ...parseEnvironmentFile(await readFile(file, "utf8")), ...env }, findings: [] };
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === "ENOENT") return { env, findings: [] };
    return {
      env,
      findings: [
        {
          check: "settings",
          status: "warning",
          message: `${file} cannot be read (${errorMessage(error)}); defaults are checked instead`,
          remedy: "run palebluedot-agent doctor as root",
        },
      ],
    };
  }
}

/** NAME=value lines as systemd's EnvironmentFile has them: comments, blank lines, values in quotes. */
function parseEnvironmentFile(text: string): Record<string, string> {
  const values: Record<string, string> = {};
  for (const line of text.split(/\r?\n/)) {
    const match = /^\s*([A-Za-z_][A-Za-z0-9_]*)\s*=\s*(.*?)\s*$/.exec(line);
    const [, name, value] = match ?? [];
    // Empty is as good as not set: the packaged file names settings that have no value yet.
    if (name === undefined || value === undefined || value === "") continue;
    values[name] = /^(["']).*\1$/.test(value) && value.length > 1 ? value.slice(1, -1) : value;
  }
  return values;
}
