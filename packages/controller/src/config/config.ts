import { z } from "zod";

/**
 * Controller settings. Every name is an environment variable; a file (`PALEBLUEDOT_CONFIG`, JSON) may hold
 * the same names, and the environment wins. All faults are reported together.
 */
const port = z.coerce.number().int().min(0).max(65535);

export const configSchema = z.object({
  /** REST API and console. */
  SERVER_PORT: port.default(8080),
  SERVER_HOST: z.string().min(1).default("127.0.0.1"),
  /** PEM files; both or none. Without them REST is plain HTTP, for loopback or a proxy in front. */
  SERVER_TLS_CERT_FILE: z.string().optional(),
  SERVER_TLS_KEY_FILE: z.string().optional(),
  /** Absent: embedded PostgreSQL under the data directory. */
  DATABASE_URL: z.url({ protocol: /^postgres(ql)?$/ }).optional(),
  /** Absent: events reach live subscribers only. */
  NATS_URL: z.string().optional(),
  TINKERBELL_URL: z.url().optional(),
  PALEBLUEDOT_DATA_DIR: z.string().min(1).default("/var/lib/palebluedot-controller"),
  /** 32 random bytes, base64; made in the data directory when absent. */
  PALEBLUEDOT_SECRET_KEY_FILE: z.string().optional(),
  /** Enrolment (server TLS) and agent (mutual TLS) listeners. */
  PALEBLUEDOT_AGENT_HOST: z.string().min(1).default("0.0.0.0"),
  PALEBLUEDOT_ENROLMENT_PORT: port.default(8443),
  PALEBLUEDOT_AGENT_PORT: port.default(8444),
  /** host:port told to agents after enrolment; absent: the host they reached, with the agent port. */
  PALEBLUEDOT_AGENT_ENDPOINT: z.string().optional(),
  /** Extra DNS names and addresses in the listeners' certificate, comma separated. */
  PALEBLUEDOT_AGENT_NAMES: z
    .string()
    .default("")
    .transform((value) =>
      value
        .split(",")
        .map((name) => name.trim())
        .filter((name) => name !== ""),
    ),
  PALEBLUEDOT_TELEMETRY_INTERVAL_MS: z.coerce.number().int().min(1000).max(600_000).default(10_000),
  PALEBLUEDOT_CERTIFICATE_HOURS: z.coerce.number().min(0.01).max(8760).default(24),
  PALEBLUEDOT_LOG_LEVEL: z
    .enum(["trace", "debug", "info", "warn", "error", "fatal", "silent"])
    .default("info"),
  /** REST requests a second that one credential may make, sustained; bursts may hold twice as many. */
  PALEBLUEDOT_RATE_LIMIT_PER_SECOND: z.coerce.number().min(1).max(100_000).default(500),
  /** Events older than this go, unless NATS has yet to take them. */
  PALEBLUEDOT_EVENT_RETENTION_DAYS: z.coerce.number().min(0.01).max(3650).default(30),
  /** How long a start may take while its agent pulls the image; agents give a pull up after 60 minutes. */
  PALEBLUEDOT_PROVISIONING_SECONDS: z.coerce.number().int().min(300).max(86_400).default(3600),
  /** How long open requests and streams may take to end at shutdown. */
  PALEBLUEDOT_SHUTDOWN_SECONDS: z.coerce.number().min(0).max(600).default(10),
  /** Names one fail-point to die at (tests only): see reconciler/failpoints.ts. */
  PALEBLUEDOT_FAILPOINT: z.string().optional(),
});

export type ControllerConfig = z.infer<typeof configSchema>;
