import { randomUUID } from "node:crypto";
import { readdir, readFile } from "node:fs/promises";
import { fileURLToPath } from "node:url";
import { PlatformError } from "@palebluedot/shared/errors.ts";
import type { Logger } from "@palebluedot/shared/logger.ts";
import type { Sql } from "postgres";

export interface Migration {
  readonly number: number;
  readonly name: string;
  /** True: code of an earlier release cannot work on the schema that this makes. */
  readonly breaking: boolean;
  readonly sql: string;
}

export interface MigrationResult {
  readonly applied: readonly string[];
  readonly incarnation: string;
}

// Any constant: who holds it migrates.
const advisoryLock = 7_205_759_403;

export const migrationsDirectory = fileURLToPath(new URL("migrations", import.meta.url));

/** Numbered files `NNNN_name.sql`, without gaps, each with its `-- breaking: yes|no` header. */
export async function readMigrations(directory: string = migrationsDirectory): Promise<Migration[]> {
  const files = (await readdir(directory)).filter((file) => file.endsWith(".sql")).sort();
  const migrations: Migration[] = [];
  for (const [index, file] of files.entries()) {
    const match = /^(\d{4})_([a-z0-9_]+)\.sql$/.exec(file);
    const sql = await readFile(`${directory}/${file}`, "utf8");
    const header = /^-- breaking: (yes|no)\n/.exec(sql);
    if (match === null || Number(match[1]) !== index + 1 || header === null) {
      throw new PlatformError({
        code: "migration-malformed",
        kind: "internal",
        message: `${file}: expected number ${String(index + 1).padStart(4, "0")} and the header "-- breaking: yes" or "no"`,
      });
    }
    migrations.push({ number: index + 1, name: file, breaking: header[1] === "yes", sql });
  }
  return migrations;
}

/**
 * Brings the schema up to date. Starters may race (an advisory lock orders them); each migration commits
 * together with its number. A newer schema is accepted unless one of its migrations is breaking.
 * Errors: PlatformError `schema-too-new`.
 */
export async function migrate(
  sql: Sql,
  options: { readonly log?: Logger; readonly migrations?: readonly Migration[] } = {},
): Promise<MigrationResult> {
  const migrations = options.migrations ?? (await readMigrations());
  const applied: string[] = [];
  const connection = await sql.reserve();
  try {
    // Another starter's migration may take longer than any ordinary statement.
    await connection`select set_config('statement_timeout', '0', false)`;
    await connection`select pg_advisory_lock(${advisoryLock})`;
    try {
      await connection.unsafe(`create table if not exists schema_migrations (
        number integer primary key,
        name text not null,
        breaking boolean not null,
        applied_at timestamptz not null default now()
      )`);
      const done = await connection<{ number: number; name: string; breaking: boolean }[]>`
        select number, name, breaking from schema_migrations order by number`;
      const newest = migrations.length;
      const tooNew = done.filter((row) => row.number > newest && row.breaking);
      if (tooNew.length > 0) {
        throw new PlatformError({
          code: "schema-too-new",
          kind: "unavailable",
          message: `the database was changed by a newer release: ${tooNew.map((row) => row.name).join(", ")}`,
          hint: "Run the newer controller, or restore the backup made before the upgrade.",
        });
      }
      const doneNumbers = new Set(done.map((row) => row.number));
      for (const migration of migrations) {
        if (doneNumbers.has(migration.number)) continue;
        await connection.unsafe("begin");
        try {
          await connection.unsafe(migration.sql);
          await connection`insert into schema_migrations (number, name, breaking)
            values (${migration.number}, ${migration.name}, ${migration.breaking})`;
          await connection.unsafe("commit");
        } catch (error) {
          await connection.unsafe("rollback");
          throw error;
        }
        applied.push(migration.name);
        options.log?.info({ migration: migration.name }, "migrated the database");
      }
      await connection`insert into installation (incarnation) values (${randomUUID()}) on conflict do nothing`;
      const [row] = await connection<{ incarnation: string }[]>`select incarnation from installation`;
      return { applied, incarnation: row?.incarnation ?? "" };
    } finally {
      await connection`select pg_advisory_unlock(${advisoryLock})`.catch(() => undefined);
      await connection`select set_config('statement_timeout', '30000', false)`.catch(() => undefined);
    }
  } finally {
    connection.release();
  }
}
