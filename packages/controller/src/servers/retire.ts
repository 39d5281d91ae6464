import type { Sql } from "postgres";
import { serverNotFound } from "./queries.ts";
import type { ServerStates } from "./state-machine.ts";

export type RetireOutcome =
  | { readonly retired: true }
  | { readonly retired: false; readonly why: string; readonly hint: string };

/**
 * Moves a server to `retired` unless something is on it. The row lock orders this with the scheduler's
 * commit, which touches the same row. Idempotent. Throws `server-not-found`.
 */
export async function retireServer(
  sql: Sql,
  states: ServerStates,
  id: string,
  reason: string,
  actor: string,
): Promise<RetireOutcome> {
  return await sql.begin(async (tx): Promise<RetireOutcome> => {
    const found = await tx<{ name: string; state: string }[]>`
      select name, state from servers where id = ${id} for update`;
    const server = found[0];
    if (server === undefined) throw serverNotFound(id);
    if (server.state === "retired") return { retired: true };
    const live = await tx<{ count: number }[]>`
      select count(distinct allocation_id)::int as count from claims
      where server_id = ${id} and released_at is null`;
    const count = live[0]?.count ?? 0;
    if (count > 0) {
      return {
        retired: false,
        why: `${count === 1 ? "one allocation is" : `${count} allocations are`} on server "${server.name}"`,
        hint: "Set draining, wait until they ended or release them, then retire the server.",
      };
    }
    const from = await states.transition(tx, { serverId: id, to: "retired", message: reason, actor });
    if (from === undefined) {
      return {
        retired: false,
        why: `server "${server.name}" is ${server.state}: it cannot be retired from there`,
        hint: "Wait until it left that state.",
      };
    }
    return { retired: true };
  });
}
