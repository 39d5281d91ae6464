import { randomUUID } from "node:crypto";
import { PlatformError } from "@palebluedot/shared/errors.ts";
import type { Sql } from "postgres";

interface NewIncarnation {
  readonly previous: string;
  readonly incarnation: string;
}

/**
 * Gives the database's history another name, after a restore: agents then take generations that are lower than
 * those they hold. Refused while a controller holds a lease on the database (it would go on under the old name),
 * unless forced. Error: `controller-running`.
 */
export async function renewIncarnation(
  sql: Sql,
  options: { readonly force: boolean },
): Promise<NewIncarnation> {
  return await sql.begin(async (tx) => {
    const [old] = await tx<{ incarnation: string }[]>`select incarnation from installation for update`;
    const holders = await tx<{ name: string }[]>`
      select name from leader_leases where expires_at > clock_timestamp() order by name`;
    if (holders.length > 0 && !options.force) {
      throw new PlatformError({
        code: "controller-running",
        kind: "conflict",
        message: `a controller works on this database: ${holders.map(({ name }) => name).join(", ")}`,
        hint: "Stop every controller and wait 30 seconds. A backup of a running one may hold fresh leases, too: --force when none runs.",
      });
    }
    const incarnation = randomUUID();
    await tx`update installation set incarnation = ${incarnation}`;
    return { previous: old?.incarnation ?? "", incarnation };
  });
}
