import { setImmediate } from "node:timers/promises";
import { errorMessage } from "@palebluedot/shared/errors.ts";
import { Goodbye_Reason } from "@palebluedot/shared/generated/palebluedot/agent/v1/agent.ts";
import type { AllocationAgentPort } from "../allocations/types.ts";
import type { Dependencies } from "../dependencies.ts";
import type { LocalSessions } from "./registry.ts";
import type { AgentSession } from "./session.ts";
import {
  dropReplicaLease,
  endSessions,
  findStale,
  markUnreachable,
  releaseDeadReplicas,
  releaseOwn,
  renewReplicaLease,
} from "./session-store.ts";

export interface PresenceOptions {
  /** Disconnected for longer than this: `unreachable`. */
  readonly unreachableAfterMs: number;
  /** How often the database is compared with the sessions here. */
  readonly checkIntervalMs: number;
  /** Sessions that one check compares; default 2000. */
  readonly comparedAtOnce?: number;
}

/**
 * Keeps what the database says of who is connected true: ends of sessions (in batches), this replica's own
 * life, the sessions of replicas that died, `unreachable` after the grace, and sessions that were fenced or
 * revoked at another replica while a notification was lost.
 */
export interface Presence {
  /** Call before the listener opens. */
  start(): Promise<void>;
  ended(serverId: string, epoch: number): void;
  /** Call after the last session ended. */
  stop(): Promise<void>;
}

/**
 * Most sessions that one look compares with the database. A look comes with every check, so that lost
 * notifications are made up for within some checks, and a large fleet is not read whole every time.
 */
const defaultComparedAtOnce = 2000;

export function createPresence(
  deps: Dependencies,
  sessions: LocalSessions,
  allocations: AllocationAgentPort,
  options: PresenceOptions,
): Presence {
  const { sql, replicaId } = deps;
  const comparedAtOnce = options.comparedAtOnce ?? defaultComparedAtOnce;
  const leaseTtlMs = Math.max(options.checkIntervalMs * 4, 30_000);
  const ended = new Map<string, number>();
  const unsubscribe: (() => void)[] = [];
  let flushTimer: NodeJS.Timeout | undefined;
  let checkTimer: NodeJS.Timeout | undefined;
  let checking: Promise<void> | undefined;
  let stopped = false;

  async function flush(): Promise<void> {
    flushTimer = undefined;
    const batch = [...ended].map(([serverId, epoch]) => ({ serverId, epoch }));
    ended.clear();
    try {
      await endSessions(sql, batch);
    } catch (error) {
      deps.log.warn({ err: errorMessage(error), servers: batch.length }, "ended sessions were not recorded");
      // A newer end of the same server stays.
      for (const one of batch) if (!ended.has(one.serverId)) ended.set(one.serverId, one.epoch);
      if (!stopped) flushTimer = setTimeout(() => void flush(), 1000);
    }
  }

  async function dropStale(some: readonly AgentSession[]): Promise<void> {
    const mine = some.map((session) => ({
      serverId: session.serverId,
      epoch: session.epoch,
      serial: session.peer.certificateSerial,
    }));
    for (const stale of await findStale(sql, mine)) {
      const session = sessions.get(stale.serverId);
      if (session === undefined || session.epoch > stale.epoch) continue;
      if (stale.why === "revoked") session.end(Goodbye_Reason.REVOKED, "the certificate was revoked");
      else session.end(Goodbye_Reason.FENCED, "a newer session of the same certificate took over");
    }
  }

  // Where the last look ended, in the order of the sessions.
  let comparedUpTo = 0;

  async function dropSomeStale(): Promise<void> {
    const all = sessions.sessions();
    if (comparedUpTo >= all.length) comparedUpTo = 0;
    const some = all.slice(comparedUpTo, comparedUpTo + comparedAtOnce);
    comparedUpTo += comparedAtOnce;
    await dropStale(some);
  }

  // What to look at as soon as the look under way has ended; however often it is asked for, that is one look.
  const suspects = new Set<string>();
  let allSuspect = false;
  let looking: Promise<void> | undefined;

  async function lookAtSuspects(): Promise<void> {
    // Those who ask in the same moment come along, too.
    await setImmediate();
    while (!stopped && (allSuspect || suspects.size > 0)) {
      const some = allSuspect
        ? sessions.sessions()
        : [...suspects].flatMap((serverId) => sessions.get(serverId) ?? []);
      suspects.clear();
      allSuspect = false;
      for (let at = 0; at < some.length; at += comparedAtOnce) {
        await dropStale(some.slice(at, at + comparedAtOnce));
      }
    }
  }

  /** `serverId` absent: any of them. */
  function suspect(serverId?: string): void {
    if (serverId === undefined) allSuspect = true;
    else if (sessions.get(serverId) === undefined) return;
    else suspects.add(serverId);
    looking ??= look();
  }

  async function look(): Promise<void> {
    try {
      await lookAtSuspects();
    } catch (error) {
      // Not kept: the next checks look at everybody.
      deps.log.warn({ err: errorMessage(error) }, "sessions could not be compared with the database");
    }
    looking = undefined;
  }

  function endExpired(): void {
    const now = deps.clock.now();
    for (const session of sessions.sessions()) {
      if (session.peer.certificateNotAfterMs > now) continue;
      session.end(Goodbye_Reason.PROTOCOL_ERROR, "the certificate expired: renew it and connect again");
    }
  }

  async function check(): Promise<void> {
    try {
      endExpired();
      await renewReplicaLease(sql, replicaId, leaseTtlMs);
      await releaseDeadReplicas(sql);
      await dropSomeStale();
      const lost = await markUnreachable(sql, options.unreachableAfterMs);
      if (lost.length > 0) {
        deps.log.warn({ servers: lost.length }, "servers became unreachable");
        allocations.capacityChanged(lost);
        for (let at = 0; at < lost.length; at += 150) {
          await deps.notifications.notify("fleet", lost.slice(at, at + 150).join(","));
        }
      }
    } catch (error) {
      deps.log.warn({ err: errorMessage(error) }, "presence check failed; it is tried again");
    }
    if (!stopped) {
      checkTimer = setTimeout(() => {
        checking = check();
      }, options.checkIntervalMs);
    }
  }

  return {
    async start() {
      await releaseOwn(sql, replicaId);
      await renewReplicaLease(sql, replicaId, leaseTtlMs);
      unsubscribe.push(
        deps.notifications.listen(
          "certificates",
          (serverId) => suspect(serverId),
          () => suspect(),
        ),
        deps.notifications.listen("sessions", (payload) => {
          const [serverId = "", epoch = ""] = payload.split(":");
          const session = sessions.get(serverId);
          if (session !== undefined && session.epoch < Number(epoch)) {
            sessions.disconnect(serverId, "fenced", "a newer session took over at another replica");
          }
        }),
        deps.notifications.listen(
          "desired_state",
          (payload) => {
            sessions.desiredStateChanged(payload === "*" ? [...sessions.connected()] : payload.split(","));
          },
          () => sessions.desiredStateChanged([...sessions.connected()]),
        ),
      );
      checking = check();
    },

    ended(serverId, epoch) {
      ended.set(serverId, epoch);
      flushTimer ??= setTimeout(() => void flush(), 50);
    },

    async stop() {
      stopped = true;
      clearTimeout(checkTimer);
      clearTimeout(flushTimer);
      for (const end of unsubscribe) end();
      await checking;
      await looking;
      await flush();
      await dropReplicaLease(sql, replicaId).catch((error: unknown) =>
        deps.log.warn({ err: errorMessage(error) }, "the replica's lease was not given back"),
      );
    },
  };
}
