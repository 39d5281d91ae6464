import type { Sql, TransactionSql } from "postgres";
import type { AllocationService } from "../allocations/types.ts";
import { revokeAllCertificates } from "../enrolment/revocation.ts";
import type { Actor } from "../enrolment/types.ts";
import { serverNotFound } from "./queries.ts";
import type { ServerStates } from "./state-machine.ts";

export type RetireOutcome =
  | { readonly retired: true; readonly abandonedAllocations: number }
  | { readonly retired: false; readonly why: string; readonly hint: string };

/**
 * Moves a server to `retired` and revokes its certificates, in one transaction, unless something is on it. The
 * row lock orders this with the scheduler's commit and with new sessions, which touch the same row. With
 * `abandon` the allocations of a server that is gone end with it. Idempotent. Throws `server-not-found`. The
 * caller announces the revocation afterwards.
 */
export async function retireServer(
  deps: {
    readonly sql: Sql;
    readonly states: ServerStates;
    readonly allocations: Pick<AllocationService, "abandonOn">;
  },
  request: {
    readonly id: string;
    readonly reason: string;
    /** Also when allocations are live on it, provided that its agent is unreachable. */
    readonly abandon: boolean;
    readonly actor: Actor;
  },
): Promise<RetireOutcome> {
  const { id, reason, actor } = request;
  let committed: (() => void) | undefined;
  const outcome = await deps.sql
    .begin(async (tx): Promise<RetireOutcome> => {
      const [server] = await tx<{ name: string; state: string; unreachable: boolean }[]>`
      select name, state, session_replica is null and conditions ? 'unreachable' as unreachable
      from servers where id = ${id} for update`;
      if (server === undefined) throw serverNotFound(id);
      if (server.state === "retired") return { retired: true, abandonedAllocations: 0 };
      const [live] = await tx<{ count: number }[]>`
      select count(distinct allocation_id)::int as count from claims
      where server_id = ${id} and released_at is null`;
      const count = live?.count ?? 0;
      if (count > 0 && !(request.abandon && server.unreachable)) {
        return {
          retired: false,
          why: `${count === 1 ? "one allocation is" : `${count} allocations are`} on server "${server.name}"${
            request.abandon ? ", and its agent is not unreachable" : ""
          }`,
          hint: server.unreachable
            ? "If the host is gone for good, abandon them: pbd servers retire --abandon --reason ..."
            : "Set draining, wait until they ended or release them, then retire the server.",
        };
      }
      if (count > 0) {
        committed = await deps.allocations.abandonOn(tx, id, { reason, actor: actor.name });
        await holdGpusBack(tx, id, reason);
      }
      const from = await deps.states.transition(tx, {
        serverId: id,
        to: "retired",
        message: reason,
        actor: actor.name,
      });
      if (from === undefined) throw new NotFromHere(server.name, server.state);
      await revokeAllCertificates(tx, id, reason, actor);
      return { retired: true, abandonedAllocations: count };
    })
    .catch((error: unknown): RetireOutcome => {
      if (!(error instanceof NotFromHere)) throw error;
      return {
        retired: false,
        why: error.message,
        hint: "Wait until it left that state.",
      };
    });
  if (outcome.retired) committed?.();
  return outcome;
}

/** Thrown, so that what the transaction did until then is undone. */
class NotFromHere extends Error {
  constructor(name: string, state: string) {
    super(`server "${name}" is ${state}: it cannot be retired from there`);
  }
}

/**
 * Nobody verified these GPUs, and what was started on them may run still. Should the host come back, under this
 * record or another, they are found again but given to nobody until an operator opens them; the host's agent then
 * still starts nothing on a GPU before it removed the old container and saw the GPU idle.
 */
async function holdGpusBack(tx: TransactionSql, serverId: string, reason: string): Promise<void> {
  await tx`
    update gpus set present = false, health = 'unknown', health_reason = 'not reported', schedulable = false,
      schedulable_reason = ${`its server was retired without a clean-up: ${reason}`.slice(0, 500)},
      updated_at = now()
    where server_id = ${serverId}`;
}
