import { isPlatformError } from "@palebluedot/shared/errors.ts";

/** What scripts branch on; stable, listed in `pbd --help`. */
export const exitCodes = {
  ok: 0,
  failure: 1,
  usage: 2,
  notFound: 3,
  authentication: 4,
  conflict: 5,
  unavailable: 6,
} as const;

export type ExitCode = (typeof exitCodes)[keyof typeof exitCodes];

export const exitCodeHelp = `Exit codes:
  0  done
  1  it failed
  2  wrong usage, or the controller refused the request as invalid
  3  not found
  4  not authenticated or not allowed
  5  conflicts with the present state
  6  controller not reachable, overloaded, or a time limit passed`;

/** The exit code of anything thrown. */
export function exitCodeOf(error: unknown): ExitCode {
  if (!isPlatformError(error)) return exitCodes.failure;
  switch (error.kind) {
    case "invalid":
    case "too-large":
      return exitCodes.usage;
    case "not-found":
      return exitCodes.notFound;
    case "unauthenticated":
    case "forbidden":
      return exitCodes.authentication;
    case "conflict":
      return exitCodes.conflict;
    case "unavailable":
    case "exhausted":
      return exitCodes.unavailable;
    case "internal":
      return exitCodes.failure;
    default:
      // A kind of a newer copy of the class.
      return exitCodes.failure;
  }
}
