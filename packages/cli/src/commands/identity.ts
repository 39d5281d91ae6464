import { z } from "zod";
import type { ApiClient } from "../api.ts";
import { assignments, defineCommand, integerText, limitInput, limitOption } from "../command.ts";
import type { Column } from "../output.ts";
import { parseDurationSeconds } from "../quantities.ts";
import { joinTokenSchema, resolveId, tenantSchema, tokenSchema } from "./resources.ts";

type JoinToken = z.output<typeof joinTokenSchema>;

const joinTokenColumns: Column<JoinToken>[] = [
  { header: "name", value: (token) => token.name },
  { header: "uses", value: (token) => `${token.uses ?? 0}/${token.max_uses ?? "?"}` },
  { header: "approves", value: (token) => (token.auto_approve === true ? "yes" : "no") },
  { header: "server", value: (token) => token.server_id },
  { header: "expires", value: (token) => token.expires_at },
  { header: "revoked", value: (token) => token.revoked_at },
  { header: "id", value: (token) => token.id },
];

export const joinTokenCreate = defineCommand({
  path: ["join-token", "create"],
  description: "Make a token that lets agents enrol; shown once",
  options: [
    { flags: "--name <name>", description: "what it is for" },
    { flags: "--uses <count>", description: "how many agents may use it (default 1)" },
    { flags: "--expires-in <duration>", description: "such as 1h or 7d (default 1d)" },
    { flags: "--auto-approve", description: "unknown servers come in without an operator's approval" },
    { flags: "--server <server>", description: "good for this registered server only" },
    { flags: "--pool <pool>", description: "container (default) or bare_metal" },
    {
      flags: "--label <assignment>",
      description: "NAME=VALUE put on the servers that use it",
      repeatable: true,
    },
  ],
  examples: ["pbd join-token create --name rack-7 --uses 16 --auto-approve --expires-in 2h"],
  input: z.object({
    name: z.string().min(1).max(128).default("pbd"),
    uses: integerText(1, 100_000).default(1),
    expiresIn: z.string().default("1d"),
    autoApprove: z.boolean().default(false),
    server: z.string().optional(),
    pool: z.enum(["container", "bare_metal"]).default("container"),
    label: assignments,
  }),
  async run(context, input) {
    const expiresInSeconds = parseDurationSeconds(input.expiresIn);
    const api = await context.api();
    const token = await api.call("POST", "join-tokens", joinTokenSchema, {
      body: {
        name: input.name,
        max_uses: input.uses,
        expires_in_seconds: expiresInSeconds,
        auto_approve: input.autoApprove,
        pool: input.pool,
        labels: input.label,
        ...(input.server === undefined ? {} : { server_id: await resolveId(api, "server", input.server) }),
      },
    });
    context.output.item(token, [
      { header: "token", value: (row) => row.token },
      { header: "ca fingerprint", value: (row) => row.ca_fingerprint },
      { header: "expires", value: (row) => row.expires_at },
      { header: "id", value: (row) => row.id },
    ]);
    context.output.note("The token is not shown again. Hand it to the agent in a file of mode 0600.");
  },
});

export const joinTokenList = defineCommand({
  path: ["join-token", "list"],
  description: "List join tokens",
  options: [limitOption],
  input: z.object({ limit: limitInput }),
  async run(context, { limit }) {
    const api = await context.api();
    context.output.list(await api.list("join-tokens", joinTokenSchema, { limit }), joinTokenColumns);
  },
});

export const joinTokenRevoke = defineCommand({
  path: ["join-token", "revoke"],
  description: "Revoke a join token; servers that used it stay",
  arguments: [{ name: "id", description: "id of pbd join-token list" }],
  input: z.object({ id: z.uuid("an id of pbd join-token list") }),
  async run(context, { id }) {
    const api = await context.api();
    const token = await api.call("DELETE", `join-tokens/${id}`, joinTokenSchema.nullable());
    if (token !== null && context.output.format === "json") context.output.item(token, joinTokenColumns);
    context.output.note(`Join token ${token?.name ?? id} is revoked.`);
  },
});

const tenantColumns: Column<z.output<typeof tenantSchema>>[] = [
  { header: "name", value: (tenant) => tenant.name },
  { header: "created", value: (tenant) => tenant.created_at },
  { header: "disabled", value: (tenant) => tenant.disabled_at },
  { header: "id", value: (tenant) => tenant.id },
];

export const tenantsList = defineCommand({
  path: ["tenants", "list"],
  description: "List tenants",
  options: [limitOption],
  input: z.object({ limit: limitInput }),
  async run(context, { limit }) {
    const api = await context.api();
    context.output.list(await api.list("tenants", tenantSchema, { limit }), tenantColumns);
  },
});

export const tenantsCreate = defineCommand({
  path: ["tenants", "create"],
  description: "Create a tenant",
  arguments: [{ name: "name", description: "lower-case letters, digits and dashes" }],
  input: z.object({ name: z.string() }),
  async run(context, { name }) {
    const api = await context.api();
    context.output.item(await api.call("POST", "tenants", tenantSchema, { body: { name } }), tenantColumns);
  },
});

export const tokensCreate = defineCommand({
  path: ["tokens", "create"],
  description: "Make an API token for a tenant, or for staff; shown once",
  options: [
    { flags: "--tenant <tenant>", description: "name or id of the tenant it acts for" },
    { flags: "--role <role>", description: "admin, operator or metrics, for a token without a tenant" },
    { flags: "--name <name>", description: "who or what uses it" },
    { flags: "--expires-in <duration>", description: "such as 12h or 90d (default: it does not expire)" },
  ],
  examples: ["pbd tokens create --tenant research --name ci --expires-in 90d"],
  input: z
    .object({
      tenant: z.string().optional(),
      role: z.enum(["admin", "operator", "metrics"]).optional(),
      name: z.string().min(1).max(128).default("pbd"),
      expiresIn: z.string().optional(),
    })
    .refine((input) => (input.tenant === undefined) !== (input.role === undefined), {
      error: "give either --tenant or --role",
      path: ["tenant"],
    }),
  async run(context, input) {
    const expiry =
      input.expiresIn === undefined
        ? {}
        : {
            expires_at: new Date(context.now() + parseDurationSeconds(input.expiresIn) * 1000).toISOString(),
          };
    const api = await context.api();
    const token =
      input.tenant === undefined
        ? await api.call("POST", "tokens", tokenSchema, {
            body: { name: input.name, role: input.role, ...expiry },
          })
        : await api.call(
            "POST",
            `tenants/${await resolveId(api, "tenant", input.tenant)}/tokens`,
            tokenSchema,
            {
              body: { name: input.name, ...expiry },
            },
          );
    context.output.item(token, [
      { header: "token", value: (row) => row.token },
      { header: "role", value: (row) => row.role },
      { header: "tenant", value: (row) => row.tenant_id },
      { header: "expires", value: (row) => row.expires_at },
      { header: "id", value: (row) => row.id },
    ]);
    context.output.note("The token is not shown again.");
  },
});

const tokenColumns: Column<z.output<typeof tokenSchema>>[] = [
  { header: "name", value: (token) => token.name },
  { header: "role", value: (token) => token.role },
  { header: "created", value: (token) => token.created_at },
  { header: "expires", value: (token) => token.expires_at },
  { header: "revoked", value: (token) => token.revoked_at },
  { header: "id", value: (token) => token.id },
];

const tenantOption = {
  flags: "--tenant <tenant>",
  description: "name or id of the tenant it acts for (without: tokens of admins and operators)",
};

/** Where the tokens of a tenant are, or those of staff. */
async function tokensPath(api: ApiClient, tenant: string | undefined): Promise<string> {
  return tenant === undefined ? "tokens" : `tenants/${await resolveId(api, "tenant", tenant)}/tokens`;
}

export const tokensList = defineCommand({
  path: ["tokens", "list"],
  description: "List API tokens of staff, or of a tenant",
  options: [tenantOption, limitOption],
  input: z.object({ tenant: z.string().optional(), limit: limitInput }),
  async run(context, { tenant, limit }) {
    const api = await context.api();
    const path = await tokensPath(api, tenant);
    context.output.list(await api.list(path, tokenSchema, { limit }), tokenColumns);
  },
});

export const tokensRevoke = defineCommand({
  path: ["tokens", "revoke"],
  description: "Revoke an API token at once",
  arguments: [{ name: "id", description: "id of pbd tokens list" }],
  options: [tenantOption],
  input: z.object({ id: z.uuid("an id of pbd tokens list"), tenant: z.string().optional() }),
  async run(context, { id, tenant }) {
    const api = await context.api();
    const path = await tokensPath(api, tenant);
    const token = await api.call("DELETE", `${path}/${id}`, tokenSchema.nullable());
    if (token !== null && context.output.format === "json") context.output.item(token, tokenColumns);
    context.output.note(`Token ${token?.name ?? id} is revoked.`);
  },
});
