import { readFileSync } from "node:fs";
import { errorMessage, PlatformError } from "@palebluedot/shared/errors.ts";
import { configSchema, type ControllerConfig } from "./config.ts";

export interface ConfigFault {
  /** The setting's name, or the file's path for a fault of the file itself. */
  readonly setting: string;
  readonly source: "environment" | "file" | "default";
  readonly message: string;
}

const settingNames = Object.keys(configSchema.shape);

/** Settings whose value may hold a password: a fault names them, never quotes them. */
const hints: Readonly<Record<string, string>> = {
  SERVER_PORT: "a TCP port, 0 to 65535 (0: any free one)",
  PALEBLUEDOT_ENROLMENT_PORT: "a TCP port, 0 to 65535 (0: any free one)",
  PALEBLUEDOT_AGENT_PORT: "a TCP port, 0 to 65535 (0: any free one)",
  DATABASE_URL: "postgres://user:password@host:5432/database; leave it out for the embedded PostgreSQL",
  TINKERBELL_URL: "URL of the Kubernetes API that holds Tinkerbell's resources",
  PALEBLUEDOT_LOG_LEVEL: "trace, debug, info, warn, error, fatal or silent",
  PALEBLUEDOT_TELEMETRY_INTERVAL_MS: "milliseconds, 1000 to 600000",
};

interface FileSettings {
  readonly values: Readonly<Record<string, unknown>>;
  readonly faults: readonly ConfigFault[];
}

function readSettingsFile(path: string): FileSettings {
  const fault = (message: string): FileSettings => ({
    values: {},
    faults: [{ setting: path, source: "file", message }],
  });
  let text: string;
  try {
    text = readFileSync(path, "utf8");
  } catch (error) {
    return fault(`cannot be read: ${errorMessage(error)}`);
  }
  let parsed: unknown;
  try {
    parsed = JSON.parse(text);
  } catch {
    // The parser's own message quotes the text, and the text may hold a password.
    return fault("is not JSON");
  }
  if (typeof parsed !== "object" || parsed === null || Array.isArray(parsed)) {
    return fault('must hold one JSON object, e.g. {"SERVER_PORT": 8080}');
  }
  const values: Record<string, unknown> = {};
  const faults: ConfigFault[] = [];
  for (const [name, value] of Object.entries(parsed)) {
    if (!settingNames.includes(name)) {
      faults.push({
        setting: name,
        source: "file",
        message: "there is no such setting",
      });
    } else if (typeof value !== "string" && typeof value !== "number") {
      faults.push({ setting: name, source: "file", message: "must be a string or a number" });
    } else {
      values[name] = value;
    }
  }
  return { values, faults };
}

/**
 * Reads the settings from the environment and, where `PALEBLUEDOT_CONFIG` names one, a JSON file with the
 * same names; the environment wins, an empty variable counts as absent. Throws one PlatformError
 * `config-invalid` that lists every fault; no value is ever quoted in it.
 */
export function loadConfig(env: Readonly<Record<string, string | undefined>>): ControllerConfig {
  const path = env["PALEBLUEDOT_CONFIG"];
  const file: FileSettings =
    path === undefined || path === "" ? { values: {}, faults: [] } : readSettingsFile(path);
  const fromEnvironment = Object.fromEntries(
    settingNames.flatMap((name) => {
      const value = env[name];
      return value === undefined || value === "" ? [] : [[name, value] as const];
    }),
  );
  const faults: ConfigFault[] = [...file.faults];
  const parsed = configSchema.safeParse({ ...file.values, ...fromEnvironment });
  if (!parsed.success) {
    for (const issue of parsed.error.issues) {
      const setting = String(issue.path[0] ?? "");
      const source = setting in fromEnvironment ? "environment" : setting in file.values ? "file" : "default";
      const expected = hints[setting];
      faults.push({
        setting,
        source,
        message: expected === undefined ? issue.message : `${issue.message}; expected ${expected}`,
      });
    }
  } else {
    faults.push(...crossFaults(parsed.data));
  }
  if (faults.length > 0 || !parsed.success) throw configError(faults);
  return parsed.data;
}

/** Rules that need two settings. */
function crossFaults(config: ControllerConfig): ConfigFault[] {
  const faults: ConfigFault[] = [];
  if ((config.SERVER_TLS_CERT_FILE === undefined) !== (config.SERVER_TLS_KEY_FILE === undefined)) {
    const missing =
      config.SERVER_TLS_CERT_FILE === undefined ? "SERVER_TLS_CERT_FILE" : "SERVER_TLS_KEY_FILE";
    faults.push({
      setting: missing,
      source: "default",
      message: "SERVER_TLS_CERT_FILE and SERVER_TLS_KEY_FILE are needed together",
    });
  }
  const ports = [
    ["SERVER_PORT", config.SERVER_PORT],
    ["PALEBLUEDOT_ENROLMENT_PORT", config.PALEBLUEDOT_ENROLMENT_PORT],
    ["PALEBLUEDOT_AGENT_PORT", config.PALEBLUEDOT_AGENT_PORT],
  ] as const;
  for (const [index, [name, port]] of ports.entries()) {
    const other = ports.slice(0, index).find(([, earlier]) => earlier === port && port !== 0);
    if (other !== undefined) {
      faults.push({
        setting: name,
        source: "default",
        message: `${other[0]} uses port ${port} already; the listeners need three different ports`,
      });
    }
  }
  return faults;
}

function configError(faults: readonly ConfigFault[]): PlatformError {
  const lines = faults.map((fault) => `  ${fault.setting} (${fault.source}): ${fault.message}`);
  return new PlatformError({
    code: "config-invalid",
    kind: "invalid",
    message: `${faults.length === 1 ? "one setting is" : `${faults.length} settings are`} wrong:\n${lines.join("\n")}`,
    hint: "Settings come from the environment and from the JSON file that PALEBLUEDOT_CONFIG names; docs/configuration.md lists them.",
    details: { faults },
  });
}
