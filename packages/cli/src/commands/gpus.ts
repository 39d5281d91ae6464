import { z } from "zod";
import { defineCommand, limitInput, limitOption } from "../command.ts";
import type { Column } from "../output.ts";
import { formatBytes } from "../quantities.ts";
import { capacitySchema, gpuSchema, resolveId } from "./resources.ts";

type Gpu = z.output<typeof gpuSchema>;

const memory = (bytes: number | null | undefined): string | undefined =>
  bytes === null || bytes === undefined ? undefined : formatBytes(bytes);

const columns: Column<Gpu>[] = [
  { header: "server", value: (gpu) => gpu.server_name ?? gpu.server_id },
  { header: "index", value: (gpu) => gpu.index },
  { header: "model", value: (gpu) => gpu.model },
  { header: "memory", value: (gpu) => memory(gpu.memory_bytes) },
  { header: "state", value: (gpu) => gpu.state },
  { header: "health", value: (gpu) => gpu.health },
  { header: "schedulable", value: (gpu) => (gpu.schedulable === false ? "no" : "yes") },
  { header: "id", value: (gpu) => gpu.id },
];

export const gpusList = defineCommand({
  path: ["gpus", "list"],
  description: "List GPUs",
  options: [
    { flags: "--model <model>", description: "part of the model's name" },
    { flags: "--server <server>", description: "only of this server (name or id)" },
    { flags: "--state <state>", description: "free or claimed" },
    { flags: "--health <health>", description: "healthy, degraded, unhealthy or unknown" },
    {
      flags: "--label <selector>",
      description: "KEY=VALUE or KEY; repeated: all must hold",
      repeatable: true,
    },
    limitOption,
  ],
  input: z.object({
    model: z.string().optional(),
    server: z.string().optional(),
    state: z.enum(["free", "claimed"]).optional(),
    health: z.enum(["healthy", "degraded", "unhealthy", "unknown"]).optional(),
    label: z.array(z.string()).optional(),
    limit: limitInput,
  }),
  async run(context, { limit, server, ...filters }) {
    const api = await context.api();
    const query = {
      ...filters,
      server_id: server === undefined ? undefined : await resolveId(api, "server", server),
    };
    context.output.list(await api.list("gpus", gpuSchema, { query, limit }), columns);
  },
});

export const gpusShow = defineCommand({
  path: ["gpus", "show"],
  description: "Show a GPU with its latest reading",
  arguments: [{ name: "id", description: "id as pbd gpus list shows it" }],
  input: z.object({ id: z.uuid("an id as pbd gpus list shows it") }),
  async run(context, { id }) {
    const api = await context.api();
    const gpu = await api.call("GET", `gpus/${id}`, gpuSchema);
    const status = await api.call(
      "GET",
      `gpus/${id}/status`,
      z.looseObject({
        sample: z.record(z.string(), z.unknown()).nullish(),
        sample_age_seconds: z.number().nullish(),
      }),
    );
    context.output.item({ ...gpu, status }, [
      ...columns,
      { header: "uuid", value: (row) => row.uuid },
      { header: "serial", value: (row) => row.serial },
      { header: "pci", value: (row) => row.pci_bus_id },
      { header: "mig", value: (row) => row.mig_enabled },
      { header: "health reason", value: (row) => row.health_reason },
      { header: "scheduling reason", value: (row) => row.schedulable_reason },
      {
        header: "reading age",
        value: () =>
          typeof status.sample_age_seconds === "number" ? `${Math.round(status.sample_age_seconds)} s` : null,
      },
      ...Object.entries(status.sample ?? {})
        .filter(([, value]) => ["string", "number", "boolean"].includes(typeof value))
        .map(([name, value]) => ({ header: name, value: () => value as string | number | boolean })),
    ]);
  },
});

export const gpusSet = defineCommand({
  path: ["gpus", "set"],
  description: "Hold a GPU back from allocations, or give it to them again",
  arguments: [{ name: "id", description: "id as pbd gpus list shows it" }],
  options: [
    { flags: "--schedulable <yes|no>", description: "no: nothing new is placed on it; what runs goes on" },
    { flags: "--reason <text>", description: "shown with the GPU" },
  ],
  examples: ['pbd gpus set 01a2... --schedulable no --reason "fan is replaced on Friday"'],
  input: z.object({
    id: z.uuid("an id as pbd gpus list shows it"),
    schedulable: z.enum(["yes", "no"], "yes or no"),
    reason: z.string().max(500).optional(),
  }),
  async run(context, { id, schedulable, reason }) {
    const api = await context.api();
    const gpu = await api.call("PATCH", `gpus/${id}`, gpuSchema, {
      // Without a reason the one of before goes: it says nothing about now.
      body: { scheduling: { schedulable: schedulable === "yes", reason } },
    });
    context.output.item(gpu, [...columns, { header: "reason", value: (row) => row.schedulable_reason }]);
  },
});

export const capacityShow = defineCommand({
  path: ["capacity"],
  description: "Free and total GPUs by model",
  input: z.object({}),
  async run(context) {
    const api = await context.api();
    const items = await api.call("GET", "capacity", z.looseObject({ items: z.array(capacitySchema) }));
    context.output.list(items.items, [
      { header: "model", value: (row) => row.model },
      { header: "memory", value: (row) => memory(row.memory_bytes) },
      { header: "free", value: (row) => row.free_count },
      { header: "claimed", value: (row) => row.claimed_count },
      { header: "unavailable", value: (row) => row.unavailable_count },
      { header: "total", value: (row) => row.total_count },
      { header: "most free in one server", value: (row) => row.largest_free_count },
    ]);
  },
});
