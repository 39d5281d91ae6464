import { type sendUnaryData, type ServerUnaryCall, type UntypedServiceImplementation } from "@grpc/grpc-js";
import { isPlatformError, PlatformError } from "@palebluedot/shared/errors.ts";
import {
  EnrolState,
  type EnrolmentServiceServer,
  type EnrolResponse,
  type RenewResponse,
} from "@palebluedot/shared/generated/palebluedot/agent/v1/enrolment.ts";
import { toGrpcStatus } from "@palebluedot/shared/grpc-status.ts";
import { Counter } from "prom-client";
import type { Dependencies } from "../dependencies.ts";
import { Gate } from "./gate.ts";
import type { EnrolmentInternals } from "./service.ts";

/** Failed attempts one address may make in a window: tokens are unguessable, this keeps the log readable. */
const failuresPerWindow = 30;
const failureWindowMs = 60_000;
const maxSources = 10_000;
/** Enrolments in the database at once, and how many may wait: a rack that powers on is a burst. */
const concurrent = 8;
const maxWaiting = 20_000;
const pendingRetrySeconds = 5;

/** The enrolment RPCs. `agentPort` is asked late: the listener's port may be the system's choice. */
export function createEnrolmentHandlers(
  deps: Dependencies,
  enrolment: EnrolmentInternals,
  agentPort: () => number,
): EnrolmentServiceServer & UntypedServiceImplementation {
  const failures = new FailureLimit(() => deps.clock.now());
  const gate = new Gate(concurrent, maxWaiting);
  const outcomes = new Counter({
    name: "palebluedot_enrolments_total",
    help: "Enrolment and renewal calls by outcome",
    labelNames: ["call", "outcome"],
    registers: [deps.metrics],
  });
  const authorities = enrolment.authorities.map((authority) => authority.certificateDer);

  async function answer<Request, Response>(
    call: ServerUnaryCall<Request, Response>,
    name: string,
    work: () => Promise<Response>,
  ): Promise<Response> {
    const source = addressOf(call.getPeer());
    failures.check(source);
    try {
      const response = await gate.run(work);
      outcomes.inc({ call: name, outcome: "ok" });
      return response;
    } catch (error) {
      const code = isPlatformError(error) ? error.code : "internal";
      outcomes.inc({ call: name, outcome: code });
      if (isPlatformError(error) && error.kind !== "unavailable" && error.kind !== "internal") {
        failures.count(source);
        deps.log.warn({ call: name, source, code, reason: error.message }, "enrolment refused");
      } else {
        deps.log.error({ call: name, source, err: error }, "enrolment failed");
      }
      throw error;
    }
  }

  function endpoint(call: ServerUnaryCall<unknown, unknown>): string {
    if (deps.config.PALEBLUEDOT_AGENT_ENDPOINT !== undefined) return deps.config.PALEBLUEDOT_AGENT_ENDPOINT;
    // The host that the agent reached us by works from where it is; ours might not.
    const host = call.getHost().replace(/:\d+$/, "");
    return `${host}:${agentPort()}`;
  }

  return {
    enrol: (call, callback) => {
      void respond(
        callback,
        answer(call, "enrol", async (): Promise<EnrolResponse> => {
          const outcome = await enrolment.enrol(call.request);
          const base = {
            serverId: outcome.serverId,
            caCertificatesDer: authorities,
            agentEndpoint: endpoint(call),
            controllerTimeUnixMs: deps.clock.now(),
          };
          if (outcome.kind === "pending") {
            return {
              ...base,
              state: EnrolState.PENDING,
              certificateDer: Buffer.alloc(0),
              retryAfterSeconds: pendingRetrySeconds,
              message: `${outcome.reason}; an operator can approve it: pbd servers approve ${outcome.serverId}`,
            };
          }
          return {
            ...base,
            state: EnrolState.ISSUED,
            certificateDer: outcome.certificate.der,
            retryAfterSeconds: 0,
            message: "",
          };
        }),
      );
    },
    renew: (call, callback) => {
      void respond(
        callback,
        answer(call, "renew", async (): Promise<RenewResponse> => {
          const certificate = await enrolment.renew(call.request);
          return {
            certificateDer: certificate.der,
            caCertificatesDer: authorities,
            agentEndpoint: endpoint(call),
            controllerTimeUnixMs: deps.clock.now(),
          };
        }),
      );
    },
  };
}

async function respond<T>(callback: sendUnaryData<T>, work: Promise<T>): Promise<void> {
  let response: T;
  try {
    response = await work;
  } catch (error) {
    callback(toGrpcStatus(error));
    return;
  }
  callback(null, response);
}

function addressOf(peer: string): string {
  return peer.replace(/:\d+$/, "");
}

/** Failures per source address in a fixed window; the oldest address is forgotten when the map is full. */
class FailureLimit {
  readonly #now: () => number;
  readonly #sources = new Map<string, { windowStart: number; failures: number }>();

  constructor(now: () => number) {
    this.#now = now;
  }

  check(source: string): void {
    const entry = this.#sources.get(source);
    if (entry === undefined || entry.failures < failuresPerWindow) return;
    if (this.#now() - entry.windowStart >= failureWindowMs) return;
    throw new PlatformError({
      code: "enrolment-rate-limited",
      kind: "exhausted",
      message: "too many refused enrolments from this address",
      hint: `Try again in ${failureWindowMs / 1000} s, with a valid join token.`,
    });
  }

  count(source: string): void {
    const now = this.#now();
    const entry = this.#sources.get(source);
    if (entry !== undefined && now - entry.windowStart < failureWindowMs) {
      entry.failures += 1;
      return;
    }
    this.#sources.delete(source);
    if (this.#sources.size >= maxSources) {
      for (const oldest of this.#sources.keys()) {
        this.#sources.delete(oldest);
        break;
      }
    }
    this.#sources.set(source, { windowStart: now, failures: 1 });
  }
}
