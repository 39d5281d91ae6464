import { ChannelCredentials, status, type ClientDuplexStream, type ServiceError } from "@grpc/grpc-js";
import { controllerTlsName, maxSessionMessageBytes } from "@palebluedot/shared/agent-link.ts";
import { fullJitterMs } from "@palebluedot/shared/backoff.ts";
import { agentCapabilities } from "@palebluedot/shared/capabilities.ts";
import type { Clock } from "@palebluedot/shared/clock.ts";
import { errorMessage } from "@palebluedot/shared/errors.ts";
import {
  AgentServiceClient,
  Goodbye_Reason,
  type Command,
  type DesiredState,
  type Goodbye,
  type SessionRequest,
  type SessionResponse,
  type Welcome,
} from "@palebluedot/shared/generated/palebluedot/agent/v1/agent.ts";
import type { Logger } from "@palebluedot/shared/logger.ts";
import type { Credentials } from "../enrolment/credential-store.ts";
import type { Enrolment } from "../enrolment/enrolment.ts";
import type { EventJournal } from "../journal/types.ts";
import type { Reconciler } from "../reconcile/types.ts";
import { uploadLogs } from "./log-upload.ts";
import type { Upstream } from "./upstream.ts";

const welcomeTimeoutMs = 20_000;
const maxLogStreams = 32;
const backoff = { baseMs: 500, capMs: 30_000 } as const;
/** After these the other side means it: coming back at once would only repeat it. */
const fencedPauseMs = 30_000;
/** A session that lived this long was a good one: the next attempt starts without back-off. */
const goodSessionMs = 10_000;

export interface SessionOptions {
  readonly enrolment: Enrolment;
  readonly reconciler: Pick<Reconciler, "setDesired" | "held" | "logs" | "observed">;
  readonly journal: EventJournal;
  readonly upstream: Upstream;
  readonly agentVersion: string;
  readonly bootId: string;
  readonly clock: Clock;
  readonly log: Logger;
  readonly random?: () => number;
  readonly onWelcome?: (welcome: Welcome) => void;
  readonly onDesired?: (desired: DesiredState) => void;
  /** The controller asks for a fresh look at the host. */
  readonly refreshInventory: () => Promise<void>;
}

export interface Session {
  /** Connects, and connects again, until the signal aborts. Never rejects for reasons of the network. */
  run(signal: AbortSignal): Promise<void>;
  connected(): boolean;
  /** Ends the current stream so that the next one uses the newest certificate. */
  reconnect(): void;
}

interface Outcome {
  readonly welcomed: boolean;
  readonly livedMs: number;
  readonly goodbye: Goodbye | undefined;
  readonly error: ServiceError | undefined;
  /** `reconnect` was called. */
  readonly renewed: boolean;
}

export function createSession(options: SessionOptions): Session {
  const { clock, log, upstream, reconciler } = options;
  const random = options.random ?? Math.random;
  let connected = false;
  let endCurrent: (() => void) | undefined;
  let applying: Promise<void> | undefined;
  let nextDesired: DesiredState | undefined;
  /** The last welcome's. */
  let serverId: string | undefined;
  let logStreams = 0;

  /** One document at a time; of those that wait only the newest counts. */
  function apply(desired: DesiredState): void {
    nextDesired = desired;
    options.onDesired?.(desired);
    applying ??= (async () => {
      while (nextDesired !== undefined) {
        const document: DesiredState = nextDesired;
        nextDesired = undefined;
        try {
          await reconciler.setDesired(document, serverId);
        } catch (error) {
          log.error(
            { err: errorMessage(error) },
            "the desired state could not be taken over; it is tried again",
          );
          nextDesired ??= document;
          await clock.sleep(1000 + fullJitterMs(0, backoff, random));
        }
      }
      applying = undefined;
    })();
  }

  function command(client: AgentServiceClient, message: Command, signal: AbortSignal): void {
    const fail = (code: string, text: string): void =>
      upstream.result({ id: message.id, ok: false, errorCode: code, errorMessage: text });
    switch (message.command?.$case) {
      case "openLogs": {
        if (logStreams >= maxLogStreams) {
          fail("too-many-log-streams", `${maxLogStreams} logs are being read from this host already`);
          return;
        }
        logStreams += 1;
        void uploadLogs({ client, reconciler, commandId: message.id, request: message.command.value, signal })
          .then((result) => upstream.result(result))
          .finally(() => {
            logStreams -= 1;
          });
        return;
      }
      case "refreshInventory":
        options.refreshInventory().then(
          () => upstream.result({ id: message.id, ok: true, errorCode: "", errorMessage: "" }),
          (error: unknown) => fail("refresh-failed", errorMessage(error)),
        );
        return;
      case undefined:
        fail("unknown-command", "this agent does not know the command: it is older than the controller");
    }
  }

  function connectOnce(credentials: Credentials, signal: AbortSignal): Promise<Outcome> {
    return new Promise((resolve) => {
      const abort = new AbortController();
      const startedMs = performance.now();
      let welcomed = false;
      let goodbye: Goodbye | undefined;
      let failure: ServiceError | undefined;
      let renewed = false;
      const client = new AgentServiceClient(
        credentials.agentEndpoint,
        ChannelCredentials.createSsl(
          Buffer.from(credentials.authorityPem),
          Buffer.from(credentials.privateKeyPem),
          Buffer.from(credentials.certificatePem),
        ),
        {
          "grpc.ssl_target_name_override": controllerTlsName,
          // A connection cut without a word is noticed, also while nothing is said.
          "grpc.keepalive_time_ms": 20_000,
          "grpc.keepalive_timeout_ms": 10_000,
          "grpc.keepalive_permit_without_calls": 0,
          "grpc.max_receive_message_length": maxSessionMessageBytes * 4,
          "grpc.max_send_message_length": maxSessionMessageBytes,
          // Reconnecting is this loop's business, with its own back-off and newest certificate.
          "grpc.use_local_subchannel_pool": 1,
          "grpc.enable_retries": 0,
        },
      );
      const stream: ClientDuplexStream<SessionRequest, SessionResponse> = client.session();
      const timer = setTimeout(() => stream.cancel(), welcomeTimeoutMs);
      const onAbort = (): void => {
        // Half-close first: the controller then knows that this was on purpose.
        stream.end();
        setTimeout(() => stream.cancel(), 500).unref();
      };
      signal.addEventListener("abort", onAbort, { once: true });
      endCurrent = () => {
        renewed = true;
        onAbort();
      };
      let done = false;
      const finish = (): void => {
        if (done) return;
        done = true;
        clearTimeout(timer);
        signal.removeEventListener("abort", onAbort);
        endCurrent = undefined;
        connected = false;
        upstream.detach();
        abort.abort(new Error("the session ended"));
        client.close();
        resolve({ welcomed, livedMs: performance.now() - startedMs, goodbye, error: failure, renewed });
      };
      stream.on("data", (response: SessionResponse) => {
        const { message } = response;
        switch (message?.$case) {
          case "welcome":
            clearTimeout(timer);
            welcomed = true;
            connected = true;
            welcome(message.value, stream);
            return;
          case "desiredState":
            apply(message.value);
            return;
          case "eventAck":
            if (upstream.acked(message.value.journalId, message.value.lastSequence)) {
              forget(message.value.lastSequence);
            }
            return;
          case "command":
            command(client, message.value, AbortSignal.any([signal, abort.signal]));
            return;
          case "goodbye":
            goodbye = message.value;
            return;
          case undefined:
            // Of a later protocol version.
            return;
        }
      });
      stream.on("drain", () => upstream.drained());
      stream.on("end", () => stream.end());
      stream.on("error", (error: ServiceError) => {
        failure = error;
      });
      stream.on("status", finish);
      const held = reconciler.held();
      stream.write({
        message: {
          $case: "hello",
          value: {
            agentVersion: options.agentVersion,
            bootId: options.bootId,
            capabilities: [...agentCapabilities],
            incarnation: held.incarnation,
            generation: held.generation,
            journalId: options.journal.journalId,
            agentTimeUnixMs: clock.now(),
          },
        },
      });
    });
  }

  function forget(sequence: number): void {
    options.journal
      .ackUpTo(sequence)
      .catch((error: unknown) =>
        log.warn({ err: errorMessage(error) }, "the event journal could not be shortened"),
      );
  }

  function welcome(message: Welcome, stream: ClientDuplexStream<SessionRequest, SessionResponse>): void {
    log.info({ server_id: message.serverId, epoch: message.sessionEpoch }, "connected to the controller");
    serverId = message.serverId;
    options.enrolment.controllerTime(message.controllerTimeUnixMs);
    options.onWelcome?.(message);
    forget(message.lastEventSequence);
    // Before it is sent: the whole picture belongs to every new session.
    upstream.observed(reconciler.observed());
    upstream.attach(stream, message.lastEventSequence);
    if (message.desiredState !== undefined) apply(message.desiredState);
  }

  /** How long to wait before the next attempt, and what was learned from the last one. */
  async function pause(outcome: Outcome, attempt: number): Promise<number> {
    if (outcome.renewed) return 0;
    switch (outcome.goodbye?.reason) {
      case Goodbye_Reason.FENCED:
        log.error(
          { reason: outcome.goodbye.message },
          "another agent uses this host's certificate: was a disk cloned? Waiting before the next attempt",
        );
        return fencedPauseMs + fullJitterMs(attempt, { baseMs: fencedPauseMs, capMs: 300_000 }, random);
      case Goodbye_Reason.REVOKED:
        log.error(
          { reason: outcome.goodbye.message },
          "the controller does not accept this host's certificate",
        );
        await options.enrolment.connectionFailed();
        return 1000 + fullJitterMs(attempt, { baseMs: 2000, capMs: 60_000 }, random);
      case Goodbye_Reason.SHUTTING_DOWN:
        return fullJitterMs(attempt, { baseMs: 4000, capMs: 30_000 }, random);
      case Goodbye_Reason.OVERLOADED:
        return fullJitterMs(attempt, { baseMs: 8000, capMs: 60_000 }, random);
      case Goodbye_Reason.PROTOCOL_ERROR:
        log.error({ reason: outcome.goodbye.message }, "the controller ended the session");
        await options.enrolment.connectionFailed();
        return fullJitterMs(attempt, { baseMs: 5000, capMs: 60_000 }, random);
      case Goodbye_Reason.UNSPECIFIED:
      case Goodbye_Reason.UNRECOGNIZED:
      case undefined:
        break;
    }
    if (outcome.error !== undefined && outcome.error.code !== status.CANCELLED) {
      log.warn(
        { reason: outcome.error.details, code: status[outcome.error.code] },
        "no session with the controller",
      );
    }
    if (!outcome.welcomed) await options.enrolment.connectionFailed();
    return fullJitterMs(attempt, backoff, random);
  }

  return {
    async run(signal) {
      let attempt = 0;
      while (!signal.aborted) {
        try {
          const credentials = await options.enrolment.ensure(signal);
          const outcome = await connectOnce(credentials, signal);
          if (signal.aborted) return;
          attempt = outcome.welcomed && outcome.livedMs > goodSessionMs ? 0 : attempt + 1;
          const waitMs = await pause(outcome, attempt);
          log.debug({ wait_ms: waitMs, attempt }, "waiting before the next connection");
          await clock.sleep(waitMs, signal);
        } catch (error) {
          if (signal.aborted) return;
          throw error;
        }
      }
    },
    connected: () => connected,
    reconnect: () => endCurrent?.(),
  };
}
