import { createLogger } from "@palebluedot/shared/logger.ts";
import { Registry } from "prom-client";
import { connect } from "../db/connect.ts";
import { createNotifications } from "../db/notifications.ts";
import { createFailpoints } from "../reconciler/failpoints.ts";
import { createEventFeature } from "./feature.ts";

/**
 * The relay as a process of its own, so that a test can kill it: DATABASE_URL, NATS_URL and
 * PALEBLUEDOT_FAILPOINT from the environment. Ends with its standard input.
 */
const sql = connect(process.env["DATABASE_URL"] ?? "", { maxConnections: 3 });
const log = createLogger({ name: "relay", level: process.env["PALEBLUEDOT_LOG_LEVEL"] ?? "silent" });
const feature = createEventFeature({
  sql,
  log,
  failpoints: createFailpoints(process.env["PALEBLUEDOT_FAILPOINT"]),
  notifications: createNotifications(sql, { log }),
  metrics: new Registry(),
  config: { NATS_URL: process.env["NATS_URL"] },
});
feature.start();
process.stdin.resume();
process.stdin.on("close", () => process.exit(0));
