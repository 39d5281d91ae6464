import { PlatformError } from "@palebluedot/shared/errors.ts";
import { z } from "zod";
import type { ApiClient } from "../api.ts";
import { assignments, defineCommand, integerText, type CommandContext } from "../command.ts";
import { resolveId, serverSchema } from "./resources.ts";

/** What an operator does to one server. Looking at servers is in servers.ts. */

const serverArgument = { name: "server", description: "name or id" };
const reasonOption = { flags: "--reason <text>", description: "kept with the event" };
const keyOption = {
  flags: "--key <sha256>",
  description: "only this key, as palebluedot-agent logs it on its host (needed when several agents wait)",
};
const key = z
  .string()
  .regex(/^[0-9a-f]{64}$/, "64 lower-case hexadecimal digits")
  .optional();
const reason = z.string().min(1).max(500).optional();

const decisionSchema = z.looseObject({ server_name: z.string().nullish() });

/** Sends one verb for a server given by name or id, and tells what became of it. */
async function act<Schema extends z.ZodType>(
  context: CommandContext,
  server: string,
  verb: string,
  schema: Schema,
  body: Readonly<Record<string, unknown>>,
  told: (answer: z.output<Schema>) => string,
): Promise<void> {
  const api = await context.api();
  const id = await resolveId(api, "server", server);
  const answer = await api.call("POST", `servers/${id}/${verb}`, schema, { body });
  if (context.output.format === "json") context.output.item(answer, []);
  context.output.note(told(answer));
}

export const serversApprove = defineCommand({
  path: ["servers", "approve"],
  description: "Let a server in that waits for approval",
  arguments: [serverArgument],
  options: [keyOption],
  input: z.object({ server: z.string(), key }),
  async run(context, input) {
    await act(
      context,
      input.server,
      "approve",
      decisionSchema,
      input.key === undefined ? {} : { public_key_sha256: input.key },
      (answer) => `Server ${answer.server_name ?? input.server} is approved.`,
    );
  },
});

export const serversReject = defineCommand({
  path: ["servers", "reject"],
  description: "Refuse a host that waits for approval",
  arguments: [serverArgument],
  options: [keyOption, reasonOption],
  input: z.object({ server: z.string(), key, reason }),
  async run(context, input) {
    await act(
      context,
      input.server,
      "reject",
      decisionSchema,
      {
        ...(input.key === undefined ? {} : { public_key_sha256: input.key }),
        ...(input.reason === undefined ? {} : { reason: input.reason }),
      },
      (answer) => `The host that asked to be ${answer.server_name ?? input.server} is refused.`,
    );
  },
});

export const serversRevoke = defineCommand({
  path: ["servers", "revoke-certificates"],
  description: "Revoke every certificate of a server at once; the host needs an approval to come back",
  arguments: [serverArgument],
  options: [reasonOption],
  input: z.object({ server: z.string(), reason }),
  async run(context, input) {
    await act(
      context,
      input.server,
      "revoke-certificates",
      z.looseObject({ revoked_count: z.number() }),
      input.reason === undefined ? {} : { reason: input.reason },
      ({ revoked_count }) =>
        `${revoked_count} certificate${revoked_count === 1 ? "" : "s"} of ${input.server} revoked.`,
    );
  },
});

export const serversRetire = defineCommand({
  path: ["servers", "retire"],
  description: "Take a server out of the fleet for good; refused while an allocation is on it",
  arguments: [serverArgument],
  options: [
    reasonOption,
    {
      flags: "--abandon",
      description:
        "end the allocations of a server that is unreachable and will not come back; needs --reason",
    },
  ],
  input: z
    .object({ server: z.string(), reason, abandon: z.boolean().default(false) })
    .refine(
      (input) => !input.abandon || input.reason !== undefined,
      "--abandon needs --reason: tenants read it",
    ),
  async run(context, input) {
    await act(
      context,
      input.server,
      "retire",
      serverSchema,
      {
        ...(input.reason === undefined ? {} : { reason: input.reason }),
        ...(input.abandon ? { abandon_allocations: true } : {}),
      },
      (answer) => `Server ${answer.name ?? input.server} is retired; its certificates are revoked.`,
    );
  },
});

async function change(
  api: ApiClient,
  server: string,
  body: Readonly<Record<string, unknown>>,
): Promise<z.output<typeof serverSchema>> {
  const id = await resolveId(api, "server", server);
  return await api.call("PATCH", `servers/${id}`, serverSchema, { body });
}

export const serversDrain = defineCommand({
  path: ["servers", "drain"],
  description: "Place nothing new on a server; what runs there goes on",
  arguments: [serverArgument],
  input: z.object({ server: z.string() }),
  async run(context, input) {
    const server = await change(await context.api(), input.server, { draining: true });
    if (context.output.format === "json") context.output.item(server, []);
    const claimed = server.gpu_claimed_count ?? 0;
    context.output.note(
      `Server ${server.name} is draining; ${claimed === 0 ? "nothing is on it" : `${claimed} of its GPUs are claimed`}.`,
    );
  },
});

export const serversUndrain = defineCommand({
  path: ["servers", "undrain"],
  description: "Place allocations on a server again",
  arguments: [serverArgument],
  input: z.object({ server: z.string() }),
  async run(context, input) {
    const server = await change(await context.api(), input.server, { draining: false });
    if (context.output.format === "json") context.output.item(server, []);
    context.output.note(`Server ${server.name} takes allocations again.`);
  },
});

export const serversSet = defineCommand({
  path: ["servers", "set"],
  description: "Change name, labels or place of a server",
  arguments: [serverArgument],
  options: [
    { flags: "--name <name>", description: "new name" },
    { flags: "--label <assignment>", description: "NAME=VALUE to add or replace", repeatable: true },
    { flags: "--unlabel <name>", description: "label to remove", repeatable: true },
    { flags: "--site <site>", description: "where it stands" },
    { flags: "--rack <rack>", description: "in which rack" },
    { flags: "--rack-unit <number>", description: "at which height" },
  ],
  examples: ["pbd servers set gpu-7 --label zone=b --rack R12 --rack-unit 17"],
  input: z.object({
    server: z.string(),
    name: z.string().optional(),
    label: assignments,
    unlabel: z.array(z.string()).default([]),
    site: z.string().optional(),
    rack: z.string().optional(),
    rackUnit: integerText(1, 100).optional(),
  }),
  async run(context, input) {
    const api = await context.api();
    const body: Record<string, unknown> = {
      ...(input.name === undefined ? {} : { name: input.name }),
      ...(input.site === undefined ? {} : { site: input.site }),
      ...(input.rack === undefined ? {} : { rack: input.rack }),
      ...(input.rackUnit === undefined ? {} : { rack_unit: input.rackUnit }),
    };
    const id = await resolveId(api, "server", input.server);
    if (Object.keys(input.label).length > 0 || input.unlabel.length > 0) {
      // The API replaces all labels: those that were not named are sent along.
      const { labels } = await api.call("GET", `servers/${id}`, serverSchema);
      const kept = Object.entries({ ...labels, ...input.label });
      body["labels"] = Object.fromEntries(kept.filter(([name]) => !input.unlabel.includes(name)));
    }
    if (Object.keys(body).length === 0) {
      throw new PlatformError({
        code: "usage",
        kind: "invalid",
        message: "nothing is to be changed",
        hint: "pbd servers set --help lists what can be.",
      });
    }
    const server = await change(api, id, body);
    if (context.output.format === "json") context.output.item(server, []);
    context.output.note(`Server ${server.name} is changed.`);
  },
});

export const serversRegister = defineCommand({
  path: ["servers", "register"],
  description: "Write a server's record before its agent enrols: a host that matches it needs no approval",
  arguments: [{ name: "name", description: "letters, digits, dots, dashes and underscores" }],
  options: [
    { flags: "--serial <serial>", description: "serial number that the hardware tells" },
    { flags: "--smbios-uuid <uuid>", description: "UUID that the hardware tells" },
    { flags: "--mac <address>", description: "MAC address of a network card", repeatable: true },
    { flags: "--bmc-mac <address>", description: "MAC address of its BMC" },
    { flags: "--bmc-address <address>", description: "address of its BMC" },
    { flags: "--pool <pool>", description: "container (default) or bare_metal" },
    { flags: "--label <assignment>", description: "NAME=VALUE", repeatable: true },
    { flags: "--site <site>", description: "where it stands" },
    { flags: "--rack <rack>", description: "in which rack" },
    { flags: "--rack-unit <number>", description: "at which height" },
  ],
  examples: ["pbd servers register gpu-7 --serial 7QX1234 --mac 04:3f:72:aa:00:17 --rack R12"],
  input: z.object({
    name: z.string(),
    serial: z.string().optional(),
    smbiosUuid: z.string().optional(),
    mac: z.array(z.string()).default([]),
    bmcMac: z.string().optional(),
    bmcAddress: z.string().optional(),
    pool: z.enum(["container", "bare_metal"]).default("container"),
    label: assignments,
    site: z.string().optional(),
    rack: z.string().optional(),
    rackUnit: integerText(1, 100).optional(),
  }),
  async run(context, input) {
    const api = await context.api();
    const server = await api.call("POST", "servers", serverSchema, {
      // What is undefined is left out of the JSON.
      body: {
        name: input.name,
        serial: input.serial,
        smbios_uuid: input.smbiosUuid,
        macs: input.mac,
        bmc_mac: input.bmcMac,
        bmc_address: input.bmcAddress,
        pool: input.pool,
        labels: input.label,
        site: input.site,
        rack: input.rack,
        rack_unit: input.rackUnit,
      },
    });
    context.output.item(server, [
      { header: "id", value: (row) => row.id },
      { header: "name", value: (row) => row.name },
      { header: "state", value: (row) => row.state },
      { header: "serial", value: (row) => row.serial },
    ]);
  },
});

export const serversEnrolments = defineCommand({
  path: ["servers", "enrolments"],
  description: "Show the hosts that asked to be this server",
  arguments: [serverArgument],
  options: [{ flags: "--state <state>", description: "pending, approved or rejected" }],
  input: z.object({
    server: z.string(),
    state: z.enum(["pending", "approved", "rejected"]).optional(),
  }),
  async run(context, input) {
    const api = await context.api();
    const id = await resolveId(api, "server", input.server);
    const text = z.string().nullish();
    const answer = await api.call(
      "GET",
      `servers/${id}/enrolments`,
      z.looseObject({
        items: z.array(
          z.looseObject({
            public_key_sha256: z.string(),
            state: text,
            reason: text,
            created_at: text,
            identity: z.looseObject({ serial: text, hostname: text }).nullish(),
          }),
        ),
      }),
      { query: { state: input.state } },
    );
    context.output.list(answer.items, [
      { header: "key", value: (row) => row.public_key_sha256 },
      { header: "state", value: (row) => row.state },
      { header: "asked", value: (row) => row.created_at },
      { header: "serial it tells", value: (row) => row.identity?.serial },
      { header: "host it tells", value: (row) => row.identity?.hostname },
      { header: "reason", value: (row) => row.reason },
    ]);
  },
});
