import { isIP } from "node:net";
import { Server, ServerCredentials, status, type ServerOptions } from "@grpc/grpc-js";
import { maxEnrolmentMessageBytes, maxSessionMessageBytes } from "@palebluedot/shared/agent-link.ts";
import { PlatformError } from "@palebluedot/shared/errors.ts";
import {
  Goodbye_Reason,
  type AgentServiceServer,
} from "@palebluedot/shared/generated/palebluedot/agent/v1/agent.ts";
import { EnrolmentServiceService } from "@palebluedot/shared/generated/palebluedot/agent/v1/enrolment.ts";
import { Counter, Gauge } from "prom-client";
import type { AllocationAgentPort } from "../allocations/types.ts";
import type { Dependencies } from "../dependencies.ts";
import { issueListenerCertificate } from "../enrolment/certificates.ts";
import { Gate } from "../enrolment/gate.ts";
import { createEnrolmentHandlers } from "../enrolment/listener.ts";
import { createEnrolmentService, serverIdOf } from "../enrolment/service.ts";
import type { EnrolmentService } from "../enrolment/types.ts";
import { createServerStates } from "../servers/state-machine.ts";
import { createTelemetryStore, type TelemetryOptions } from "../telemetry/store.ts";
import type { TelemetryStore } from "../telemetry/types.ts";
import { createLogStreams } from "./log-streams.ts";
import { createPresence } from "./presence.ts";
import { createLocalSessions } from "./registry.ts";
import { AgentSession, type Peer, type SessionDependencies } from "./session.ts";
import type { SessionRegistry } from "./types.ts";
import { guardedAgentService } from "./wire-guard.ts";

/** What all sessions together do in the database at once: the rest of the pool belongs to REST and scheduler. */
const concurrentStores = 6;
const maxWaitingStores = 50_000;
const stopDeadlineMs = 5000;
/** Longer than any restart or repair that somebody waits for; what is older is Prometheus's to know. */
const telemetryKeptMs = 3_600_000;

const commonServerOptions: ServerOptions = {
  // A host that lost power sends no FIN.
  "grpc.keepalive_time_ms": 30_000,
  "grpc.keepalive_timeout_ms": 15_000,
  // An agent has one control stream and as many log streams as readers.
  "grpc.max_concurrent_streams": 128,
};

export interface AgentListenerOptions {
  readonly allocations: AllocationAgentPort;
  /** Default 30 s. */
  readonly unreachableAfterMs?: number;
  /** How often presence is compared with the database; default 5 s. */
  readonly presenceCheckMs?: number;
  /** How many sessions each check compares; default 2000. */
  readonly presenceComparedAtOnce?: number;
  readonly telemetry?: TelemetryOptions;
  /** How often telemetry of GPUs that report no longer is looked for; default 5 min. */
  readonly telemetrySweepMs?: number;
}

export interface AgentListeners {
  readonly registry: SessionRegistry;
  readonly telemetry: TelemetryStore;
  readonly enrolment: EnrolmentService;
  readonly enrolmentPort: number;
  readonly agentPort: number;
  /** sha256 of the CA certificate, lower-case hex. */
  readonly caFingerprint: string;
  /** Says goodbye to every agent and gives the listeners up. */
  stop(): Promise<void>;
}

/** Opens the enrolment (server TLS) and agent (mutual TLS) listeners. Throws PlatformError `listen-failed`. */
export async function startAgentListeners(
  deps: Dependencies,
  options: AgentListenerOptions,
): Promise<AgentListeners> {
  const { config } = deps;
  const logStreams = createLogStreams();
  const sessions = createLocalSessions(deps, options.allocations, logStreams);
  const enrolment = await createEnrolmentService(deps, {
    disconnect: (serverId, reason, message) => sessions.disconnect(serverId, reason, message),
  });
  const presence = createPresence(deps, sessions, options.allocations, {
    unreachableAfterMs: options.unreachableAfterMs ?? 30_000,
    checkIntervalMs: options.presenceCheckMs ?? 5000,
    ...(options.presenceComparedAtOnce === undefined
      ? {}
      : { comparedAtOnce: options.presenceComparedAtOnce }),
  });
  const telemetry = createTelemetryStore(options.telemetry);
  const sweep = setInterval(
    () => telemetry.forgetOlderThan(deps.clock.now() - telemetryKeptMs),
    options.telemetrySweepMs ?? 300_000,
  ).unref();
  const counters = registerMetrics(deps, () => sessions.sessions().length, telemetry);

  const pending = new Set<AgentSession>();
  const sessionDependencies: SessionDependencies = {
    deps,
    states: createServerStates(deps),
    allocations: options.allocations,
    telemetry,
    gate: new Gate(concurrentStores, maxWaitingStores),
    loadDesired: (serverId) => sessions.desiredStates.load(serverId),
    started: (session, started) => {
      pending.delete(session);
      sessions.started(session, started);
    },
    ended: (session) => {
      pending.delete(session);
      sessions.ended(session);
      if (session.epoch > 0) presence.ended(session.serverId, session.epoch);
    },
    commandResult: (session, result) => sessions.commandResult(session, result),
    countTelemetry: (samples, refused) => {
      counters.messages.inc();
      counters.samples.inc(samples);
      if (refused > 0) counters.refused.inc(refused);
    },
  };

  const agentService: AgentServiceServer = {
    session: (call) => {
      const peer = peerOf(call.getAuthContext().sslPeerCertificate, call.getPeer());
      if (peer === undefined) {
        call.emit("error", { code: status.UNAUTHENTICATED, details: "no certificate of a server" });
        return;
      }
      pending.add(new AgentSession(peer, call, sessionDependencies));
    },
    uploadLogs: (call, callback) => {
      const peer = peerOf(call.getAuthContext().sslPeerCertificate, call.getPeer());
      // Only a live session is told to open streams, so an agent without one has nothing to upload.
      if (peer === undefined || !sessions.isConnected(peer.serverId)) {
        callback({ code: status.UNAUTHENTICATED, details: "no session" });
        return;
      }
      logStreams.accept(peer.serverId, call, callback);
    },
  };

  const listenerCertificate = await issueListenerCertificate(enrolment.authorities[0], [
    ...new Set(["localhost", "127.0.0.1", "::1", ...config.PALEBLUEDOT_AGENT_NAMES]),
  ]);
  const authorityPem = enrolment.authorities.map((authority) => authority.certificatePem).join("\n");
  const keyPair = {
    private_key: Buffer.from(listenerCertificate.privateKeyPem),
    // With the authority in the chain, a host that knows its fingerprint alone can fetch it.
    cert_chain: Buffer.from(`${listenerCertificate.certificatePem}\n${authorityPem}`),
  };

  const agentServer = new Server({
    ...commonServerOptions,
    "grpc.max_receive_message_length": maxSessionMessageBytes,
    "grpc.max_send_message_length": maxSessionMessageBytes * 4,
  });
  agentServer.addService(guardedAgentService, agentService);
  const enrolmentServer = new Server({
    ...commonServerOptions,
    "grpc.max_receive_message_length": maxEnrolmentMessageBytes,
    "grpc.max_connection_age_ms": 60_000,
    "grpc.max_connection_age_grace_ms": 30_000,
  });
  let agentPort = 0;
  enrolmentServer.addService(
    EnrolmentServiceService,
    createEnrolmentHandlers(deps, enrolment, () => agentPort),
  );

  await presence.start();
  agentPort = await bind(
    agentServer,
    config.PALEBLUEDOT_AGENT_HOST,
    config.PALEBLUEDOT_AGENT_PORT,
    ServerCredentials.createSsl(Buffer.from(authorityPem), [keyPair], true),
  );
  const enrolmentPort = await bind(
    enrolmentServer,
    config.PALEBLUEDOT_AGENT_HOST,
    config.PALEBLUEDOT_ENROLMENT_PORT,
    ServerCredentials.createSsl(null, [keyPair]),
  );
  deps.log.info(
    { enrolment_port: enrolmentPort, agent_port: agentPort, ca_fingerprint: enrolment.caFingerprint },
    "agent listeners are open",
  );

  return {
    registry: sessions,
    telemetry,
    enrolment,
    enrolmentPort,
    agentPort,
    caFingerprint: enrolment.caFingerprint,
    async stop() {
      clearInterval(sweep);
      sessions.desiredStates.stop();
      sessions.endAll(Goodbye_Reason.SHUTTING_DOWN, "the controller stops");
      for (const session of pending) session.end(Goodbye_Reason.SHUTTING_DOWN, "the controller stops");
      await Promise.all([shutdown(enrolmentServer), shutdown(agentServer)]);
      await presence.stop();
    },
  };
}

/** The server that a verified certificate names. */
function peerOf(
  certificate: { subjectaltname?: string; serialNumber: string; valid_to: string } | undefined,
  remote: string,
): Peer | undefined {
  const serverId = serverIdOf(certificate?.subjectaltname);
  if (certificate === undefined || serverId === undefined) return undefined;
  return {
    serverId,
    certificateSerial: certificate.serialNumber.toLowerCase(),
    certificateNotAfterMs: Date.parse(certificate.valid_to),
    remoteAddress: addressOf(remote),
  };
}

/**
 * The address in "<address>:<port>" as the socket tells it, without brackets; an IPv4 address that came to a
 * dual-stack socket is told as what it is. Null when there is none that others could use.
 */
export function addressOf(remote: string): string | null {
  const address = remote
    .replace(/:\d+$/, "")
    .replace(/^\[(.*)\]$/, "$1")
    .replace(/^::ffff:(?=\d+\.)/i, "");
  // With a zone it means something on this machine only.
  return isIP(address) === 0 || address.includes("%") ? null : address;
}

function bind(server: Server, host: string, port: number, credentials: ServerCredentials): Promise<number> {
  const address = host.includes(":") ? `[${host}]` : host;
  return new Promise((resolve, reject) => {
    server.bindAsync(`${address}:${port}`, credentials, (error, bound) => {
      if (error === null) {
        resolve(bound);
        return;
      }
      reject(
        new PlatformError({
          code: "listen-failed",
          kind: "unavailable",
          message: `cannot listen on ${address}:${port}`,
          hint: "Is another controller running? Choose other ports: PALEBLUEDOT_AGENT_PORT, PALEBLUEDOT_ENROLMENT_PORT.",
          cause: error,
        }),
      );
    });
  });
}

/** Calls end by themselves after Goodbye; what does not is cut. */
function shutdown(server: Server): Promise<void> {
  return new Promise((resolve) => {
    const timer = setTimeout(() => server.forceShutdown(), stopDeadlineMs);
    server.tryShutdown(() => {
      clearTimeout(timer);
      resolve();
    });
  });
}

function registerMetrics(
  deps: Dependencies,
  connected: () => number,
  telemetry: ReturnType<typeof createTelemetryStore>,
): { messages: Counter; samples: Counter; refused: Counter } {
  const registers = [deps.metrics];
  const gauge = (name: string, help: string, read: () => number): Gauge =>
    new Gauge({
      name,
      help,
      registers,
      collect() {
        this.set(read());
      },
    });
  gauge("palebluedot_agent_sessions", "Agents connected to this controller", connected);
  gauge(
    "palebluedot_telemetry_store_bytes",
    "Memory of the telemetry rings",
    () => telemetry.statistics().bytes,
  );
  return {
    messages: new Counter({
      name: "palebluedot_telemetry_messages_total",
      help: "Telemetry batches received",
      registers,
    }),
    samples: new Counter({
      name: "palebluedot_telemetry_samples_total",
      help: "GPU samples received",
      registers,
    }),
    refused: new Counter({
      name: "palebluedot_telemetry_refused_total",
      help: "GPU samples of GPUs that are not the sender's",
      registers,
    }),
  };
}
