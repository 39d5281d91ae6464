import { PlatformError } from "@palebluedot/shared/errors.ts";
import {
  Goodbye_Reason,
  type CommandResult,
  type DesiredState,
} from "@palebluedot/shared/generated/palebluedot/agent/v1/agent.ts";
import type { Dependencies } from "../dependencies.ts";
import { appendEvents } from "../events/outbox.ts";
import type { AllocationAgentPort } from "../allocations/types.ts";
import { createDesiredStates, type DesiredStates } from "./desired-states.ts";
import type { LogStreams } from "./log-streams.ts";
import type { AgentSession } from "./session.ts";
import type { StartedSession } from "./session-store.ts";
import type { SessionRegistry } from "./types.ts";

/** A session that spoke this recently is alive: another host with its certificate is a duplicate, not a restart. */
const aliveMs = 15_000;

export interface LocalSessions extends SessionRegistry {
  readonly desiredStates: DesiredStates;
  sessions(): readonly AgentSession[];
  get(serverId: string): AgentSession | undefined;
  /** The session's server is its own from now on; an older session here is fenced. */
  started(session: AgentSession, started: StartedSession): void;
  /** True when the session held its server until now. */
  ended(session: AgentSession): boolean;
  commandResult(session: AgentSession, result: CommandResult): void;
  endAll(reason: Goodbye_Reason, message: string): void;
}

export function createLocalSessions(
  deps: Dependencies,
  allocations: AllocationAgentPort,
  logStreams: LogStreams,
): LocalSessions {
  const byServer = new Map<string, AgentSession>();
  const desiredStates = createDesiredStates({
    port: allocations,
    deliver: (serverId: string, desired: DesiredState) => byServer.get(serverId)?.outgoing.desired(desired),
    clock: deps.clock,
    log: deps.log,
  });

  function fence(old: AgentSession, by: AgentSession): void {
    const twin =
      old.bootId !== "" && old.bootId !== by.bootId && deps.clock.now() - old.lastMessageMs < aliveMs;
    old.end(Goodbye_Reason.FENCED, "a newer session of the same certificate took over");
    if (!twin) return;
    deps.log.warn({ server_id: by.serverId }, "two hosts use one certificate");
    appendEvents(deps.sql, [
      {
        type: "server.duplicate-agent",
        severity: "error",
        serverId: by.serverId,
        message: "two hosts that run at the same time use this server's certificate: was a disk cloned?",
        data: { boot_ids: [old.bootId.slice(0, 64), by.bootId.slice(0, 64)] },
      },
    ]).catch((error: unknown) => deps.log.error({ err: error }, "an event was lost"));
  }

  return {
    desiredStates,
    sessions: () => [...byServer.values()],
    get: (serverId) => byServer.get(serverId),
    connected: () => byServer.keys(),
    isConnected: (serverId) => byServer.has(serverId),

    started(session, started) {
      const old = byServer.get(session.serverId);
      if (old !== undefined && old.epoch > session.epoch) {
        // Two sessions started at once, and this one lost.
        session.end(Goodbye_Reason.FENCED, "a newer session of the same certificate took over");
        return;
      }
      byServer.set(session.serverId, session);
      if (old !== undefined) fence(old, session);
      if (started.previousReplica !== null && started.previousReplica !== deps.replicaId) {
        deps.notifications
          .notify("sessions", `${session.serverId}:${session.epoch}`)
          .catch((error: unknown) =>
            deps.log.warn({ err: error }, "other replicas were not told of a session"),
          );
      }
      if (!started.wasUnreachable) return;
      allocations.capacityChanged([session.serverId]);
      deps.notifications
        .notify("fleet", session.serverId)
        .catch((error: unknown) => deps.log.warn({ err: error }, "other replicas were not told of a server"));
    },

    ended(session) {
      if (byServer.get(session.serverId) !== session) return false;
      byServer.delete(session.serverId);
      logStreams.failAllOf(session.serverId);
      return true;
    },

    commandResult(session, result) {
      if (result.ok) return;
      logStreams.fail(
        session.serverId,
        result.id,
        new PlatformError({
          code: /^[a-z0-9-]{1,64}$/.test(result.errorCode) ? result.errorCode : "log-stream-failed",
          kind: result.errorCode === "workload-not-found" ? "not-found" : "unavailable",
          message:
            result.errorMessage.replace(/[\p{Cc}]/gu, " ").slice(0, 512) ||
            "the agent could not open the log",
        }),
      );
    },

    desiredStateChanged(serverIds) {
      desiredStates.changed(serverIds.filter((id) => byServer.has(id)));
    },

    disconnect(serverId, reason, message) {
      byServer
        .get(serverId)
        ?.end(reason === "fenced" ? Goodbye_Reason.FENCED : Goodbye_Reason.REVOKED, message);
    },

    openLogs(serverId, request, signal) {
      return logStreams.open(
        serverId,
        (streamId) => {
          const session = byServer.get(serverId);
          if (session === undefined) {
            throw new PlatformError({
              code: "agent-not-connected",
              kind: "unavailable",
              message: "the server's agent is not connected here",
              hint: "Logs stay on the host; try again when the server is reachable.",
            });
          }
          // The command is named as its stream, so that a refusal finds the reader.
          session.outgoing.command({
            id: streamId,
            command: { $case: "openLogs", value: { ...request, streamId } },
          });
        },
        signal,
      );
    },

    endAll(reason, message) {
      for (const session of byServer.values()) session.end(reason, message);
    },
  };
}
