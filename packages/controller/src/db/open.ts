import { join } from "node:path";
import { errorMessage } from "@palebluedot/shared/errors.ts";
import type { Logger } from "@palebluedot/shared/logger.ts";
import type { Sql } from "postgres";
import type { ControllerConfig } from "../config/config.ts";
import { connect } from "./connect.ts";
import { type EmbeddedPostgres, startEmbeddedPostgres } from "./embedded-postgres.ts";

export interface OpenDatabase {
  readonly sql: Sql;
  /** Closes the pool, and stops the embedded server if it is ours to stop. */
  close(): Promise<void>;
}

const watchMs = 1000;
/** Sessions, scheduler and REST share them; a replica of three leaves room in a default PostgreSQL. */
const maxConnections = 20;

/**
 * The database of the configuration: DATABASE_URL, or the embedded server under the data directory, which
 * is started again whenever it is found dead. `command` is for short commands beside a running controller:
 * they leave a server running that was running before.
 */
export async function openDatabase(
  config: Pick<ControllerConfig, "DATABASE_URL" | "PALEBLUEDOT_DATA_DIR">,
  log: Logger,
  options: { readonly command?: boolean } = {},
): Promise<OpenDatabase> {
  if (config.DATABASE_URL !== undefined) {
    const sql = connect(config.DATABASE_URL, { log, maxConnections });
    return { sql, close: () => sql.end({ timeout: 5 }) };
  }
  const directory = join(config.PALEBLUEDOT_DATA_DIR, "postgres");
  let server = await startEmbeddedPostgres({ directory, log });
  const sql = connect(server.url, { log, maxConnections });
  let restarting: Promise<void> | undefined;

  async function restart(): Promise<void> {
    log.error({ postgres_pid: server.pid }, "the embedded PostgreSQL is gone; starting it again");
    try {
      server = await startEmbeddedPostgres({ directory, log });
    } catch (error) {
      // The next look tries again.
      log.error({ error: errorMessage(error) }, "the embedded PostgreSQL does not start");
    } finally {
      restarting = undefined;
    }
  }

  const timer = setInterval(() => {
    if (options.command !== true && restarting === undefined && !isAlive(server)) restarting = restart();
  }, watchMs);
  timer.unref();

  return {
    sql,
    async close() {
      clearInterval(timer);
      await restarting;
      await sql.end({ timeout: 5 });
      if (options.command !== true || !server.adopted) await server.stop();
    },
  };
}

function isAlive(server: EmbeddedPostgres): boolean {
  try {
    process.kill(server.pid, 0);
    return true;
  } catch (error) {
    // Another user's process is there, only not ours to signal.
    return (error as NodeJS.ErrnoException).code === "EPERM";
  }
}
