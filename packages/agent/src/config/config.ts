import { PlatformError } from "@palebluedot/shared/errors.ts";
import { normaliseFingerprint } from "@palebluedot/shared/pinned-authority.ts";
import { z } from "zod";

const port = z.coerce.number().int().min(0).max(65_535);
const flag = z
  .enum(["true", "false", "1", "0", "yes", "no"])
  .transform((value) => ["true", "1", "yes"].includes(value));

/**
 * Agent settings. Every name is an environment variable; flags of `run` win over it. All faults are reported
 * together. Secrets are named by file: an argument list is readable by every user of the host.
 */
const configSchema = z.object({
  /** host:port of the controller's enrolment listener. */
  PALEBLUEDOT_CONTROLLER: z.string().min(1),
  /** SHA-256 of the controller's CA certificate: the only thing trusted at first contact. */
  PALEBLUEDOT_CA_FINGERPRINT: z
    .string()
    .refine((text) => normaliseFingerprint(text) !== "", "is no SHA-256 fingerprint (64 hexadecimal digits)")
    .transform(normaliseFingerprint),
  /** Needed until the host is enrolled. */
  PALEBLUEDOT_JOIN_TOKEN_FILE: z.string().min(1).optional(),
  PALEBLUEDOT_DATA_DIR: z.string().min(1).default("/var/lib/palebluedot-agent"),
  PALEBLUEDOT_NVIDIA_SMI: z.string().min(1).default("nvidia-smi"),
  /** A log file or /dev/kmsg; "none" to leave Xids to others. */
  PALEBLUEDOT_KERNEL_LOG: z.string().min(1).default("/dev/kmsg"),
  /** JSON in place of the hardware's own identity: simulated servers. */
  PALEBLUEDOT_IDENTITY_FILE: z.string().min(1).optional(),
  /** In place of /sys: simulated servers. */
  PALEBLUEDOT_SYSFS_ROOT: z.string().min(1).default("/sys"),
  DOCKER_HOST: z.string().min(1).optional(),
  DOCKER_CERT_PATH: z.string().min(1).optional(),
  /** 0: any free port; absent: no metrics are served. */
  PALEBLUEDOT_METRICS_PORT: port.optional(),
  /** Who else may read what every tenant does is for the operator to decide. */
  PALEBLUEDOT_METRICS_HOST: z.string().min(1).default("127.0.0.1"),
  PALEBLUEDOT_METRICS_TOKEN_FILE: z.string().min(1).optional(),
  PALEBLUEDOT_METRICS_TLS_CERT_FILE: z.string().min(1).optional(),
  PALEBLUEDOT_METRICS_TLS_KEY_FILE: z.string().min(1).optional(),
  /** The fast loop. The controller may ask for fewer samples, not for more. */
  PALEBLUEDOT_TELEMETRY_INTERVAL_MS: z.coerce.number().int().min(1000).max(600_000).default(10_000),
  PALEBLUEDOT_CONTAINER_NETWORK: z.string().min(1).optional(),
  PALEBLUEDOT_PUBLISH_ADDRESS: z.string().min(1).optional(),
  /** Comma list of registries ("host" or "host:port") on the host itself that tenants may pull from. */
  PALEBLUEDOT_REGISTRY_ALLOW: z
    .string()
    .default("")
    .transform((text) =>
      text
        .split(",")
        .map((one) => one.trim())
        .filter((one) => one !== ""),
    ),
  PALEBLUEDOT_GPU_MODE: z.enum(["cdi", "nvidia-runtime", "device-nodes"]).optional(),
  PALEBLUEDOT_DEVICE_DIR: z.string().min(1).optional(),
  PALEBLUEDOT_LOG_LEVEL: z
    .enum(["trace", "debug", "info", "warn", "error", "fatal", "silent"])
    .default("info"),
  /** Ends with an error instead of trying again when enrolment is refused: for scripts. */
  PALEBLUEDOT_EXIT_ON_REFUSAL: flag.default(false),
});

export type AgentConfig = z.infer<typeof configSchema>;
export type SettingName = keyof AgentConfig;

const settingNames = Object.keys(configSchema.shape) as SettingName[];

const hints: Readonly<Record<string, string>> = {
  PALEBLUEDOT_CONTROLLER: "the controller's enrolment address, e.g. controller.example.com:8443",
  PALEBLUEDOT_CA_FINGERPRINT: "as `pbd join-token create` prints it, or the controller's log",
};

/** Reads the settings; empty strings count as absent. Throws PlatformError `config-invalid` with every fault. */
export function loadConfig(
  environment: Readonly<Record<string, string | undefined>>,
  flags: Readonly<Partial<Record<SettingName, string>>> = {},
): AgentConfig {
  const values: Record<string, string> = {};
  for (const name of settingNames) {
    const value = flags[name] ?? environment[name];
    if (value !== undefined && value !== "") values[name] = value;
  }
  const parsed = configSchema
    .refine(
      (config) =>
        (config.PALEBLUEDOT_METRICS_TLS_CERT_FILE === undefined) ===
        (config.PALEBLUEDOT_METRICS_TLS_KEY_FILE === undefined),
      { message: "certificate and key belong together", path: ["PALEBLUEDOT_METRICS_TLS_KEY_FILE"] },
    )
    .safeParse(values);
  if (parsed.success) return parsed.data;
  const faults = parsed.error.issues.map((issue) => {
    const setting = issue.path.join(".");
    const missing = values[setting] === undefined && issue.code === "invalid_type";
    return { setting, message: missing ? "is not set" : issue.message, hint: hints[setting] };
  });
  throw new PlatformError({
    code: "config-invalid",
    kind: "invalid",
    message: faults
      .map(
        (fault) => `${fault.setting} ${fault.message}${fault.hint === undefined ? "" : ` (${fault.hint})`}`,
      )
      .join("; "),
    hint: "Set them in the environment, in /etc/palebluedot/agent.env, or by flags: palebluedot-agent run --help",
    details: { faults },
  });
}
