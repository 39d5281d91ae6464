/**
 * The platform's error class. `code` is stable kebab-case and part of the API; `hint` tells the reader
 * what to do; `retryable` says whether the same call may succeed later without a change by the caller.
 * Mapped to an RFC 9457 problem or a gRPC status once, at the edge.
 */
const symbol = Symbol.for("palebluedot.PlatformError");

/** Whose fault it is; decides the HTTP status unless `status` overrides it. */
export type ErrorKind =
  | "invalid" // 400 / 422: the caller's input
  | "unauthenticated" // 401
  | "forbidden" // 403
  | "not-found" // 404
  | "conflict" // 409
  | "too-large" // 413
  | "exhausted" // 429
  | "unavailable" // 503: a part we depend on does not answer
  | "internal"; // 500: our bug

export interface PlatformErrorOptions {
  readonly code: string;
  readonly message: string;
  readonly kind: ErrorKind;
  readonly hint?: string;
  readonly status?: number;
  readonly retryable?: boolean;
  readonly cause?: unknown;
  /** Extra members of the problem document, e.g. the list of faults. Never secrets. */
  readonly details?: Readonly<Record<string, unknown>>;
}

export class PlatformError extends Error {
  readonly code: string;
  readonly kind: ErrorKind;
  readonly hint: string | undefined;
  readonly status: number | undefined;
  readonly retryable: boolean;
  readonly details: Readonly<Record<string, unknown>> | undefined;
  readonly [symbol] = true;

  constructor(options: PlatformErrorOptions) {
    super(options.message, options.cause === undefined ? undefined : { cause: options.cause });
    this.code = options.code;
    this.kind = options.kind;
    this.hint = options.hint;
    this.status = options.status;
    this.retryable = options.retryable ?? (options.kind === "unavailable" || options.kind === "exhausted");
    this.details = options.details;
  }

  static {
    this.prototype.name = "PlatformError";
  }
}

/** True also for an error made by another copy of this module. */
export function isPlatformError(error: unknown): error is PlatformError {
  return typeof error === "object" && error !== null && symbol in error;
}

/** The message of anything that was thrown. */
export function errorMessage(error: unknown): string {
  return error instanceof Error ? error.message : String(error);
}

/** Ends an exhaustive switch: a new member of the union fails to compile here. */
export function assertNever(value: never, what: string): never {
  throw new PlatformError({
    code: "unexpected-value",
    kind: "internal",
    message: `${what}: unexpected value ${JSON.stringify(value)}`,
  });
}
