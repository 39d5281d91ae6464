import { z } from "zod";
import { defineCommand, limitInput, limitOption } from "../command.ts";
import type { Column } from "../output.ts";
import { resolveId, serverSchema } from "./resources.ts";

type Server = z.output<typeof serverSchema>;

function problemsOf(server: Server): string {
  const faults = (server.conditions ?? []).filter((condition) =>
    ["failed", "degraded", "present"].includes(condition.status ?? ""),
  );
  return faults.map((condition) => condition.name).join(",");
}

const columns: Column<Server>[] = [
  { header: "name", value: (server) => server.name },
  { header: "state", value: (server) => server.state },
  { header: "agent", value: (server) => (server.connected === true ? "connected" : "away") },
  { header: "gpus", value: (server) => server.gpu_count },
  { header: "claimed", value: (server) => server.gpu_claimed_count },
  { header: "model", value: (server) => server.gpu_models?.join(", ") },
  { header: "drain", value: (server) => (server.draining === true ? "yes" : "") },
  { header: "problems", value: problemsOf },
  { header: "id", value: (server) => server.id },
];

export const serversList = defineCommand({
  path: ["servers", "list"],
  description: "List servers",
  options: [
    { flags: "--state <state>", description: "only in this state" },
    { flags: "--model <model>", description: "only with such GPUs" },
    {
      flags: "--label <selector>",
      description: "KEY=VALUE or KEY; repeated: all must hold",
      repeatable: true,
    },
    limitOption,
  ],
  input: z.object({
    state: z.string().optional(),
    model: z.string().optional(),
    label: z.array(z.string()).optional(),
    limit: limitInput,
  }),
  async run(context, { limit, ...query }) {
    const api = await context.api();
    context.output.list(await api.list("servers", serverSchema, { query, limit }), columns);
  },
});

export const serversShow = defineCommand({
  path: ["servers", "show"],
  description: "Show a server",
  arguments: [{ name: "server", description: "name or id" }],
  input: z.object({ server: z.string() }),
  async run(context, input) {
    const api = await context.api();
    const id = await resolveId(api, "server", input.server);
    const server = await api.call("GET", `servers/${id}`, serverSchema);
    context.output.item(server, [
      { header: "id", value: (row) => row.id },
      { header: "name", value: (row) => row.name },
      { header: "state", value: (row) => row.state },
      { header: "message", value: (row) => row.state_message },
      { header: "pool", value: (row) => row.pool },
      { header: "agent", value: (row) => (row.connected === true ? "connected" : "away") },
      { header: "agent version", value: (row) => row.agent_version },
      { header: "draining", value: (row) => row.draining },
      { header: "gpus", value: (row) => `${row.gpu_count ?? "?"} (${row.gpu_claimed_count ?? "?"} claimed)` },
      { header: "models", value: (row) => row.gpu_models?.join(", ") },
      { header: "serial", value: (row) => row.serial },
      { header: "bmc", value: (row) => row.bmc_address },
      {
        header: "place",
        value: (row) =>
          [row.site, row.rack, row.rack_unit]
            .filter((part) => part !== null && part !== undefined)
            .join(" / "),
      },
      {
        header: "labels",
        value: (row) =>
          Object.entries(row.labels ?? {})
            .map(([key, value]) => `${key}=${value}`)
            .join(", "),
      },
      ...(server.conditions ?? []).map((condition) => ({
        header: condition.name,
        value: () => [condition.status, condition.message].filter(Boolean).join(": "),
      })),
    ]);
  },
});
