import { Metadata, status, type ServiceError, type StatusObject } from "@grpc/grpc-js";
import { isPlatformError, PlatformError, type ErrorKind } from "@palebluedot/shared/errors.ts";

const codeKey = "palebluedot-error-code";
const hintKey = "palebluedot-error-hint-bin";

const statusOf: Readonly<Record<ErrorKind, status>> = {
  invalid: status.INVALID_ARGUMENT,
  unauthenticated: status.UNAUTHENTICATED,
  forbidden: status.PERMISSION_DENIED,
  "not-found": status.NOT_FOUND,
  conflict: status.FAILED_PRECONDITION,
  "too-large": status.OUT_OF_RANGE,
  exhausted: status.RESOURCE_EXHAUSTED,
  unavailable: status.UNAVAILABLE,
  internal: status.INTERNAL,
};

/** The gRPC status of an error, with its stable code and hint as trailers. An unknown error tells nothing. */
export function toGrpcStatus(error: unknown): Partial<StatusObject> & { code: status; details: string } {
  if (!isPlatformError(error) || error.kind === "internal") {
    return { code: status.INTERNAL, details: "internal error" };
  }
  const metadata = new Metadata();
  metadata.set(codeKey, error.code);
  if (error.hint !== undefined) metadata.set(hintKey, Buffer.from(error.hint));
  return { code: statusOf[error.kind], details: error.message, metadata };
}

/** The PlatformError that the other side threw, as far as its status tells. */
export function fromGrpcError(error: ServiceError): PlatformError {
  const code = error.metadata?.get(codeKey)[0];
  const hint = error.metadata?.get(hintKey)[0];
  const kind = (Object.keys(statusOf) as ErrorKind[]).find((one) => statusOf[one] === error.code);
  return new PlatformError({
    code:
      typeof code === "string"
        ? code
        : `grpc-${(status[error.code] ?? "unknown").toLowerCase().replaceAll("_", "-")}`,
    kind: kind ?? "unavailable",
    message: error.details === "" ? error.message : error.details,
    ...(Buffer.isBuffer(hint) ? { hint: hint.toString() } : {}),
    cause: error,
  });
}
