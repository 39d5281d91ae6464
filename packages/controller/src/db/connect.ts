import { readFileSync } from "node:fs";
import { PlatformError } from "@palebluedot/shared/errors.ts";
import type { Logger } from "@palebluedot/shared/logger.ts";
import postgres, { type Options, type Sql } from "postgres";

export interface ConnectOptions {
  readonly applicationName?: string;
  /** Default 10. LISTEN takes one more. */
  readonly maxConnections?: number;
  /** The server gives a statement up after this. Default 30,000. */
  readonly statementTimeoutMs?: number;
  readonly log?: Logger;
  /** What the server says beside its answers; default: the code goes to the log. */
  readonly onNotice?: (message: string) => void;
  /** Server settings of the sessions beside ours. */
  readonly settings?: Readonly<Record<string, string>>;
}

/**
 * A Unix socket is named as libpq does it: `?host=/directory`. The client knows no such parameter, so it
 * is taken apart here.
 */
export function socketUrl(url: string): Options<Record<string, never>> {
  const parsed = new URL(url);
  const socket = parsed.searchParams.get("host");
  const options: Options<Record<string, never>> = {
    host: decodeURIComponent(parsed.hostname || "localhost"),
    port: Number(parsed.port || parsed.searchParams.get("port") || 5432),
    database: decodeURIComponent(parsed.pathname.slice(1)),
    username: decodeURIComponent(parsed.username),
    password: decodeURIComponent(parsed.password),
  };
  if (socket?.startsWith("/")) options.path = `${socket}/.s.PGSQL.${options.port}`;
  const mode = parsed.searchParams.get("sslmode");
  if (mode !== null && mode !== "disable") {
    const rootFile = parsed.searchParams.get("sslrootcert");
    options.ssl =
      mode === "verify-full" || mode === "verify-ca"
        ? { rejectUnauthorized: true, ...(rootFile === null ? {} : { ca: readFileSync(rootFile) }) }
        : (mode as "require" | "allow" | "prefer");
  }
  return options;
}

function parseBigint(text: string): number {
  const value = Number(text);
  if (Number.isSafeInteger(value)) return value;
  throw new PlatformError({
    code: "number-too-large",
    kind: "internal",
    message: `the database holds ${text}, which is no exact number here`,
  });
}

/**
 * Every statement here touches few rows, by key. A prepared plan lives as long as its connection: one made
 * while tables were small must not read them whole when they have grown, so that is ruled out from the start.
 */
const plannerSettings = {
  enable_seqscan: "off",
  enable_hashjoin: "off",
  enable_mergejoin: "off",
  jit: "off",
};

/** The connection pool. Connects lazily; reconnects by itself with back-off. bigint columns arrive as numbers. */
export function connect(url: string, options: ConnectOptions = {}): Sql {
  return postgres({
    ...socketUrl(url),
    max: options.maxConnections ?? 10,
    connect_timeout: 10,
    // Idle connections go, so that a failed-over server is noticed and the server's limit is kept.
    idle_timeout: 300,
    onnotice: (notice) => {
      if (options.onNotice !== undefined) options.onNotice(notice["message"] ?? "");
      else options.log?.debug({ code: notice["code"] }, "database notice");
    },
    connection: {
      ...plannerSettings,
      ...options.settings,
      application_name: options.applicationName ?? "palebluedot-controller",
      statement_timeout: options.statementTimeoutMs ?? 30_000,
      idle_in_transaction_session_timeout: 60_000,
      TimeZone: "UTC",
    },
    types: {
      bigint: { to: 20, from: [20], serialize: String, parse: parseBigint },
    },
  });
}

/** SQLSTATE of a PostgreSQL error, or the client's own code (`CONNECTION_CLOSED`, `ECONNREFUSED`, ...). */
export function databaseErrorCode(error: unknown): string | undefined {
  const code = (error as { code?: unknown } | undefined)?.code;
  return typeof code === "string" ? code : undefined;
}

const transientCodes = new Set([
  "40001", // serialization failure
  "40P01", // deadlock
  "55P03", // lock not available
  "57P01", // admin shutdown
  "57P02", // crash shutdown
  "57P03", // cannot connect now
  "08000",
  "08003",
  "08006",
  "CONNECTION_CLOSED",
  "CONNECTION_ENDED",
  "CONNECTION_DESTROYED",
  "CONNECT_TIMEOUT",
  "ECONNREFUSED",
  "ECONNRESET",
  "EPIPE",
  "ENOENT", // the server's Unix socket is gone for a moment
]);

/** The statement may succeed when it is sent again. Whether a lost one took effect is not known. */
export function isTransientDatabaseError(error: unknown): boolean {
  const code = databaseErrorCode(error);
  return code !== undefined && transientCodes.has(code);
}
