import type { Clock } from "@palebluedot/shared/clock.ts";
import type { Logger } from "@palebluedot/shared/logger.ts";
import type { Sql } from "postgres";
import type { Registry } from "prom-client";
import type { ControllerConfig } from "./config/config.ts";
import type { Notifications } from "./db/notifications.ts";
import type { Failpoints } from "./reconciler/failpoints.ts";
import type { SecretBox } from "@palebluedot/shared/secret-box.ts";

/** Built once in main.ts and passed on: no singletons, and a test builds its own. */
export interface Dependencies {
  readonly config: ControllerConfig;
  readonly sql: Sql;
  readonly clock: Clock;
  readonly log: Logger;
  readonly failpoints: Failpoints;
  readonly secrets: SecretBox;
  readonly notifications: Notifications;
  readonly metrics: Registry;
  /** Names this process among the replicas. */
  readonly replicaId: string;
}
