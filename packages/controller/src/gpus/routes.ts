import { z } from "@hono/zod-openapi";
import type { HttpContext } from "../http/context.ts";
import { decodeCursor, pageOf, uuidPattern } from "../http/cursor.ts";
import {
  idParams,
  idSchema,
  labelFilter,
  labelMap,
  labelQuery,
  lineSchema,
  pageQuery,
  pageSchema,
  queryBoolean,
  queryInteger,
} from "../http/fields.ts";
import { defineRoute, type Route } from "../http/route.ts";
import { snakeCased } from "../servers/view.ts";
import { capacity, getGpu, listGpus, updateGpu } from "./queries.ts";
import { sharedRead } from "./shared-read.ts";
import {
  gpuDetailSchema,
  gpuHealthSchema,
  gpuSchema,
  gpuView,
  sampleSchema,
  sampleView,
  claimSchema,
} from "./view.ts";

const tag = "gpu";

/** The count reads every GPU, and every tenant may ask for it. */
const capacityMaxAgeMs = 2000;

const changeSchema = z
  .strictObject({
    labels: labelMap.optional().openapi({ description: "Replaces all labels" }),
    scheduling: z
      .strictObject({ schedulable: z.boolean(), reason: lineSchema(500).default("") })
      .optional()
      .openapi({ description: "Whether new allocations may land here; running ones stay" }),
  })
  .refine((change) => Object.keys(change).length > 0, "name at least one field to change")
  .openapi("GpuChange");

const statusSchema = z
  .object({
    gpu_id: z.uuid(),
    uuid: z.string(),
    server_id: z.uuid(),
    present: z.boolean(),
    connected: z.boolean(),
    health: gpuHealthSchema,
    health_reason: z.string(),
    schedulable: z.boolean(),
    state: z.enum(["free", "claimed"]),
    claims: z.array(claimSchema),
    sample: sampleSchema.nullable().openapi({ description: "The latest reading; null when there is none" }),
    sample_age_seconds: z.number().nullable(),
  })
  .openapi("GpuStatus");

const capacitySchema = z
  .object({
    model: z.string(),
    memory_bytes: z.number().int().nullable(),
    total_count: z.number().int(),
    free_count: z.number().int().openapi({ description: "Could be allocated now" }),
    claimed_count: z.number().int(),
    unavailable_count: z.number().int().openapi({ description: "Neither free nor claimed" }),
    largest_free_count: z.number().int().openapi({ description: "Most free GPUs in one server" }),
  })
  .openapi("Capacity");

const maxWindowSeconds = 3600;

export function gpuRoutes(context: HttpContext): Route[] {
  const { sql, clock } = context.deps;
  const readCapacity = sharedRead(clock, capacityMaxAgeMs, () => capacity(sql));

  const detail = async (id: string): Promise<z.input<typeof gpuDetailSchema>> => {
    const row = await getGpu(sql, id);
    return { ...gpuView(row), inventory: snakeCased(row.inventory) as Record<string, unknown> };
  };

  return [
    defineRoute({
      method: "get",
      path: "/api/v1/gpus",
      operationId: "listGpus",
      summary: "List GPUs",
      tag,
      access: "gpus:read",
      query: z.strictObject({
        ...pageQuery,
        model: lineSchema(128).min(1).optional().openapi({ description: "Part of the model's name" }),
        server_id: idSchema.optional(),
        state: z.enum(["free", "claimed"]).optional(),
        health: gpuHealthSchema.optional(),
        present: queryBoolean.optional(),
        schedulable: queryBoolean.optional(),
        label: labelQuery,
      }),
      result: pageSchema(gpuSchema),
      async handle({ query }) {
        const { limit, cursor, label, ...rest } = query;
        const filter = { ...rest, labels: labelFilter(label) };
        const scope = ["gpus", filter];
        const after = cursor === undefined ? undefined : decodeCursor(scope, cursor, uuidPattern);
        const rows = await listGpus(sql, filter, after, limit + 1);
        return { body: pageOf(rows, limit, scope, (row) => row.id, gpuView) };
      },
    }),
    defineRoute({
      method: "get",
      path: "/api/v1/gpus/{id}",
      operationId: "getGpu",
      summary: "Show a GPU with its inventory",
      tag,
      access: "gpus:read",
      params: idParams,
      result: gpuDetailSchema,
      handle: async ({ params }) => ({ body: await detail(params.id) }),
    }),
    defineRoute({
      method: "patch",
      path: "/api/v1/gpus/{id}",
      operationId: "updateGpu",
      summary: "Change labels and scheduling policy",
      tag,
      access: "gpus:write",
      params: idParams,
      body: changeSchema,
      result: gpuDetailSchema,
      async handle({ params, body, principal }) {
        const serverId = await updateGpu(sql, params.id, body, principal.actor);
        context.fleetChanged([serverId]);
        context.events.poke();
        return { body: await detail(params.id) };
      },
    }),
    defineRoute({
      method: "get",
      path: "/api/v1/gpus/{id}/status",
      operationId: "getGpuStatus",
      summary: "Show health, claims and the latest reading",
      tag,
      access: "gpus:read",
      params: idParams,
      result: statusSchema,
      async handle({ params }) {
        const view = gpuView(await getGpu(sql, params.id));
        const sample = context.telemetry.latest(view.uuid);
        return {
          body: {
            gpu_id: view.id,
            uuid: view.uuid,
            server_id: view.server_id,
            present: view.present,
            connected: view.connected,
            health: view.health,
            health_reason: view.health_reason,
            schedulable: view.schedulable,
            state: view.state,
            claims: view.claims,
            sample: sample === undefined ? null : sampleView(sample),
            sample_age_seconds:
              sample === undefined ? null : Math.max(0, (clock.now() - sample.timeUnixMs) / 1000),
          },
        };
      },
    }),
    defineRoute({
      method: "get",
      path: "/api/v1/gpus/{id}/metrics",
      operationId: "getGpuMetrics",
      summary: "Readings of a recent window, oldest first",
      description:
        "From the controller's memory, so only a recent window and only from the replica that the agent is connected to. History belongs to Prometheus.",
      tag,
      access: "gpus:read",
      params: idParams,
      query: z.strictObject({
        window_seconds: queryInteger(1, maxWindowSeconds)
          .default(300)
          .openapi({ type: "integer", minimum: 1, maximum: maxWindowSeconds, default: 300 }),
      }),
      result: z.object({
        gpu_id: z.uuid(),
        uuid: z.string(),
        window_seconds: z.number().int(),
        samples: z.array(sampleSchema),
      }),
      async handle({ params, query }) {
        const row = await getGpu(sql, params.id);
        const samples = context.telemetry.window(row.uuid, clock.now() - query.window_seconds * 1000);
        return {
          body: {
            gpu_id: row.id,
            uuid: row.uuid,
            window_seconds: query.window_seconds,
            samples: samples.map(sampleView),
          },
        };
      },
    }),
    defineRoute({
      method: "get",
      path: "/api/v1/capacity",
      operationId: "getCapacity",
      summary: "Free and total GPUs by model",
      description: "At most two seconds old.",
      tag: "capacity",
      access: "capacity:read",
      result: pageSchema(capacitySchema),
      async handle() {
        const rows = await readCapacity();
        return {
          body: {
            items: rows.map((row) => ({
              model: row.model,
              memory_bytes: row.memory_bytes,
              total_count: row.total_count,
              free_count: row.free_count,
              claimed_count: row.claimed_count,
              unavailable_count: Math.max(0, row.total_count - row.free_count - row.claimed_count),
              largest_free_count: row.largest_free_count,
            })),
            next_cursor: null,
          },
        };
      },
    }),
  ];
}
