import { z } from "@hono/zod-openapi";
import { serverPoolSchema, serverStateSchema } from "@palebluedot/shared/vocabulary.ts";
import { timeOf, timeOrNull, timeSchema } from "../http/fields.ts";

/** A server as REST shows it. */

export const conditionSchema = z
  .object({
    name: z.string(),
    status: z.string().openapi({ example: "failed" }),
    reason: z.string().openapi({ description: "Stable, kebab-case" }),
    message: z.string(),
    since: z.string().nullable(),
  })
  .openapi("Condition");

export const serverSchema = z
  .object({
    id: z.uuid(),
    name: z.string(),
    state: serverStateSchema,
    state_since: timeSchema,
    state_message: z.string(),
    pool: serverPoolSchema,
    connected: z.boolean().openapi({ description: "Its agent has a session now" }),
    connected_at: timeSchema.nullable(),
    disconnected_at: timeSchema.nullable(),
    draining: z.boolean().openapi({ description: "Nothing new is placed here" }),
    serial: z.string().nullable(),
    smbios_uuid: z.string().nullable(),
    macs: z.array(z.string()),
    bmc_mac: z.string().nullable(),
    bmc_address: z.string().nullable(),
    site: z.string().nullable(),
    rack: z.string().nullable(),
    rack_unit: z.number().int().nullable(),
    labels: z.record(z.string(), z.string()),
    conditions: z.array(conditionSchema),
    gpu_count: z.number().int(),
    gpu_claimed_count: z.number().int(),
    gpu_models: z.array(z.string()),
    agent_version: z.string().nullable(),
    agent_capabilities: z.array(z.string()),
    boot_id: z.string().nullable(),
    desired_generation: z.number().int(),
    observed_generation: z.number().int(),
    created_at: timeSchema,
    updated_at: timeSchema,
  })
  .openapi("Server");

export type ServerView = z.infer<typeof serverSchema>;

export const serverDetailSchema = serverSchema
  .extend({
    inventory: z
      .looseObject({})
      .nullable()
      .openapi({ description: "What the agent found on the host; null until it reported" }),
  })
  .openapi("ServerDetail");

export interface ServerRow {
  readonly id: string;
  readonly name: string;
  readonly state: ServerView["state"];
  readonly state_since: Date;
  readonly state_message: string;
  readonly pool: ServerView["pool"];
  readonly serial: string | null;
  readonly smbios_uuid: string | null;
  readonly bmc_mac: string | null;
  readonly bmc_address: string | null;
  readonly labels: Record<string, string>;
  readonly site: string | null;
  readonly rack: string | null;
  readonly rack_unit: number | null;
  readonly conditions: Record<string, unknown>;
  readonly agent_version: string | null;
  readonly agent_capabilities: string[];
  readonly boot_id: string | null;
  readonly session_replica: string | null;
  readonly connected_at: Date | null;
  readonly disconnected_at: Date | null;
  readonly draining: boolean;
  readonly desired_generation: string | number;
  readonly observed_generation: string | number;
  readonly created_at: Date;
  readonly updated_at: Date;
  readonly macs: string[] | null;
  readonly gpu_count: number;
  readonly gpu_claimed_count: number;
  readonly gpu_models: string[] | null;
}

const storedCondition = z
  .object({
    status: z.string().catch("unknown"),
    reason: z.string().catch(""),
    message: z.string().catch(""),
    since: z.union([z.string(), z.number()]).nullish().catch(null),
  })
  .catch({ status: "unknown", reason: "", message: "", since: null });

export function conditionsOf(stored: Record<string, unknown>): ServerView["conditions"] {
  return Object.entries(stored)
    .map(([name, value]) => {
      const condition = storedCondition.parse(value);
      // 0 is the wire's word for "not told".
      const since = new Date(condition.since ?? 0);
      const isTold = !Number.isNaN(since.getTime()) && since.getTime() !== 0;
      return { name, ...condition, since: isTold ? since.toISOString() : null };
    })
    .sort((a, b) => a.name.localeCompare(b.name));
}

export function serverView(row: ServerRow): ServerView {
  return {
    id: row.id,
    name: row.name,
    state: row.state,
    state_since: timeOf(row.state_since),
    state_message: row.state_message,
    pool: row.pool,
    connected: row.session_replica !== null,
    connected_at: timeOrNull(row.connected_at),
    disconnected_at: timeOrNull(row.disconnected_at),
    draining: row.draining,
    serial: row.serial,
    smbios_uuid: row.smbios_uuid,
    macs: row.macs ?? [],
    bmc_mac: row.bmc_mac,
    bmc_address: row.bmc_address,
    site: row.site,
    rack: row.rack,
    rack_unit: row.rack_unit,
    labels: row.labels,
    conditions: conditionsOf(row.conditions),
    gpu_count: row.gpu_count,
    gpu_claimed_count: row.gpu_claimed_count,
    gpu_models: row.gpu_models ?? [],
    agent_version: row.agent_version,
    agent_capabilities: row.agent_capabilities,
    boot_id: row.boot_id,
    desired_generation: Number(row.desired_generation),
    observed_generation: Number(row.observed_generation),
    created_at: timeOf(row.created_at),
    updated_at: timeOf(row.updated_at),
  };
}

/** camelCase of the agent link to the API's snake_case, recursively; `load1m` becomes `load_1m`. */
export function snakeCased(value: unknown): unknown {
  if (Array.isArray(value)) return value.map(snakeCased);
  if (typeof value !== "object" || value === null) return value;
  return Object.fromEntries(
    Object.entries(value).map(([key, item]) => [
      key
        .replaceAll(/([a-z])(\d+[a-z]?$)/g, "$1_$2")
        .replaceAll(/([a-z0-9])([A-Z])/g, "$1_$2")
        .toLowerCase(),
      snakeCased(item),
    ]),
  );
}
