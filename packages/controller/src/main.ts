import { errorMessage, isPlatformError } from "@palebluedot/shared/errors.ts";
import { systemClock } from "@palebluedot/shared/clock.ts";
import { createLogger, type Logger } from "@palebluedot/shared/logger.ts";
import { Command } from "commander";
import manifest from "../package.json" with { type: "json" };
import type { ControllerConfig } from "./config/config.ts";
import { prepareDataDirectory } from "./config/data-directory.ts";
import { loadConfig } from "./config/load.ts";
import { startController } from "./controller.ts";
import { renewIncarnation } from "./db/incarnation.ts";
import { migrate } from "./db/migrate.ts";
import { createNotifications } from "./db/notifications.ts";
import { openDatabase } from "./db/open.ts";
import { createIdentityService } from "./identity/identity.ts";
import { writeAdminToken } from "./identity/token-file.ts";

/** Beyond the requests' own time: agents' goodbyes, the last writes, the embedded database's shutdown. */
const shutdownGraceMs = 45_000;

const exitCodes = { failed: 1, usage: 2 } as const;

function print(value: unknown): void {
  process.stdout.write(`${JSON.stringify(value)}\n`);
}

function configured(): { config: ControllerConfig; log: Logger } {
  const config = loadConfig(process.env);
  return { config, log: createLogger({ name: "controller", level: config.PALEBLUEDOT_LOG_LEVEL }) };
}

async function run(): Promise<void> {
  const { config, log } = configured();
  // Crash-only: after a bug the process starts anew from the database instead of going on half alive.
  const crash = (error: unknown): void => {
    log.fatal({ err: error }, "unexpected error; the process ends");
    process.exit(exitCodes.failed);
  };
  process.on("uncaughtException", crash);
  process.on("unhandledRejection", crash);

  const stopSignal = new Promise<string>((resolve) => {
    for (const signal of ["SIGTERM", "SIGINT"] as const) process.once(signal, () => resolve(signal));
  });

  const controller = await startController(config, log, manifest.version);
  print({ event: "ready", ...controller.addresses });
  const signal = await stopSignal;
  log.info({ signal }, "stopping");
  const deadline = config.PALEBLUEDOT_SHUTDOWN_SECONDS * 1000 + shutdownGraceMs;
  setTimeout(() => {
    log.error({ deadline_ms: deadline }, "stopping took too long; the process ends");
    process.exit(exitCodes.failed);
  }, deadline).unref();
  await controller.stop();
  log.info("stopped");
  process.exit(0);
}

async function runMigrate(): Promise<void> {
  const { config, log } = configured();
  await prepareDataDirectory(config.PALEBLUEDOT_DATA_DIR);
  const database = await openDatabase(config, log, { command: true });
  try {
    print(await migrate(database.sql, { log }));
  } finally {
    await database.close();
  }
}

async function newIncarnation(flags: { readonly force?: boolean }): Promise<void> {
  const { config, log } = configured();
  await prepareDataDirectory(config.PALEBLUEDOT_DATA_DIR);
  const database = await openDatabase(config, log, { command: true });
  try {
    await migrate(database.sql, { log });
    const { previous, incarnation } = await renewIncarnation(database.sql, { force: flags.force === true });
    print({ previous_incarnation: previous, incarnation });
  } finally {
    await database.close();
  }
}

async function resetAdminToken(): Promise<void> {
  const { config, log } = configured();
  await prepareDataDirectory(config.PALEBLUEDOT_DATA_DIR);
  const database = await openDatabase(config, log, { command: true });
  const notifications = createNotifications(database.sql, { log });
  try {
    await migrate(database.sql, { log });
    const identity = createIdentityService({
      sql: database.sql,
      clock: systemClock,
      log,
      notifications,
      config,
    });
    let file = "";
    await identity.resetAdminToken(async (token) => {
      file = await writeAdminToken(config.PALEBLUEDOT_DATA_DIR, token);
    });
    identity.stop();
    print({ admin_token_file: file });
  } finally {
    await notifications.close();
    await database.close();
  }
}

const program = new Command("palebluedot-controller")
  .description("The fleet's controller: REST API, agent listeners and scheduler in one process.")
  .version(manifest.version)
  .addHelpText(
    "after",
    "\nSettings come from the environment and from the JSON file that PALEBLUEDOT_CONFIG names.",
  );
program
  .command("run", { isDefault: true })
  .description("run until SIGTERM; prints one JSON line when it is ready")
  .action(run);
program.command("migrate").description("bring the database's schema up to date and end").action(runMigrate);
program
  .command("new-incarnation")
  .description("after a restore from a backup: tell agents that the database begins a new history")
  .option("--force", "also while a controller's lease on the database has not run out")
  .action(newIncarnation);
program
  .command("admin-token")
  .description("the installation's first admin token")
  .command("reset")
  .description("revoke it and write a new one to <data dir>/admin-token")
  .action(resetAdminToken);

try {
  await program.parseAsync();
} catch (error) {
  const hint = isPlatformError(error) && error.hint !== undefined ? `\nhint: ${error.hint}` : "";
  const code = isPlatformError(error) ? ` [${error.code}]` : "";
  process.stderr.write(`palebluedot-controller: ${errorMessage(error)}${code}${hint}\n`);
  const isUsage = isPlatformError(error) && error.kind === "invalid";
  process.exit(isUsage ? exitCodes.usage : exitCodes.failed);
}
