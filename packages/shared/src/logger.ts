import { pino, type Logger } from "pino";

export type { Logger } from "pino";

/**
 * JSON lines on standard error (standard output belongs to machine-readable results). Redaction is the
 * last line of defence: callers do not pass secrets in the first place.
 */
export function createLogger(options: { name: string; level?: string }): Logger {
  return pino(
    {
      name: options.name,
      level: options.level ?? "info",
      base: { pid: process.pid },
      timestamp: pino.stdTimeFunctions.isoTime,
      redact: {
        paths: [
          "*.password",
          "*.token",
          "*.secret",
          "*.authorization",
          "*.private_key",
          "*.joinToken",
          "password",
          "token",
          "secret",
        ],
        censor: "[redacted]",
      },
    },
    pino.destination({ dest: 2, sync: false }),
  );
}
