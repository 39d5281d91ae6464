import { z } from "@hono/zod-openapi";
import { PlatformError } from "@palebluedot/shared/errors.ts";
import { normaliseMac, normaliseSerial, normaliseUuid } from "@palebluedot/shared/identity.ts";
import { serverPoolSchema, serverStateSchema } from "@palebluedot/shared/vocabulary.ts";
import type { Actor } from "../enrolment/types.ts";
import type { HttpContext } from "../http/context.ts";
import { decodeCursor, pageOf, uuidPattern } from "../http/cursor.ts";
import {
  idParams,
  labelFilter,
  labelMap,
  labelQuery,
  lineSchema,
  pageQuery,
  pageSchema,
  queryBoolean,
  timeOf,
  timeOrNull,
  timeSchema,
} from "../http/fields.ts";
import { defineRoute, type Route } from "../http/route.ts";
import type { Principal } from "../identity/permissions.ts";
import { getServer, listServers, registerServer, updateServer } from "./queries.ts";
import { retireServer } from "./retire.ts";
import { serverDetailSchema, serverSchema, serverView, snakeCased } from "./view.ts";

const nameSchema = z
  .string()
  .regex(
    /^[a-zA-Z0-9]([a-zA-Z0-9._-]{0,126}[a-zA-Z0-9])?$/,
    "letters, digits, dots, dashes and underscores; at most 128",
  );

/** Text that must normalise to something that identifies one machine. */
const identityText = (normalise: (text: string) => string, what: string) =>
  lineSchema(128).transform((text, check) => {
    const normal = normalise(text);
    if (normal !== "") return normal;
    check.addIssue({ code: "custom", message: `is not ${what} that names one machine` });
    return z.NEVER;
  });

const place = {
  site: lineSchema(128).min(1).nullable().optional(),
  rack: lineSchema(128).min(1).nullable().optional(),
  rack_unit: z.number().int().min(1).max(100).nullable().optional(),
};

const registrationSchema = z
  .strictObject({
    name: nameSchema,
    pool: serverPoolSchema.default("container"),
    serial: identityText(normaliseSerial, "a serial number").optional().openapi({ type: "string" }),
    smbios_uuid: identityText(normaliseUuid, "a UUID").optional().openapi({ type: "string" }),
    macs: z
      .array(identityText(normaliseMac, "a MAC address").openapi({ type: "string" }))
      .max(64)
      .default([]),
    bmc_mac: identityText(normaliseMac, "a MAC address").optional().openapi({ type: "string" }),
    bmc_address: lineSchema(255).min(1).optional(),
    labels: labelMap.default({}),
    ...place,
  })
  .openapi("ServerRegistration");

const changeSchema = z
  .strictObject({
    name: nameSchema.optional(),
    labels: labelMap.optional().openapi({ description: "Replaces all labels" }),
    draining: z.boolean().optional(),
    ...place,
  })
  .refine((change) => Object.keys(change).length > 0, "name at least one field to change")
  .openapi("ServerChange");

const enrolmentSchema = z
  .object({
    public_key_sha256: z.string(),
    server_id: z.uuid(),
    server_name: z.string(),
    join_token_id: z.uuid(),
    state: z.enum(["pending", "approved", "rejected"]),
    reason: z.string(),
    identity: z.looseObject({}).openapi({ description: "What the hardware said of itself: not verified" }),
    created_at: timeSchema,
    decided_at: timeSchema.nullable(),
  })
  .openapi("EnrolmentRequest");

const keyChoice = z
  .string()
  .regex(/^[0-9a-f]{64}$/, "sha256 of the public key, 64 lower-case hex digits")
  .optional()
  .openapi({ description: "Needed when several agents ask for this server" });

export const actorOf = (principal: Principal): Actor => ({ name: principal.actor, id: principal.tokenId });

const tag = "server";

const enrolmentView = (
  view: Awaited<ReturnType<HttpContext["enrolment"]["approveServer"]>>,
): z.input<typeof enrolmentSchema> => ({
  public_key_sha256: view.publicKeySha256,
  server_id: view.serverId,
  server_name: view.serverName,
  join_token_id: view.joinTokenId,
  state: view.state,
  reason: view.reason,
  identity: snakeCased(view.identity) as Record<string, unknown>,
  created_at: timeOf(view.createdAt),
  decided_at: timeOrNull(view.decidedAt),
});

export function serverRoutes(context: HttpContext): Route[] {
  const { sql } = context.deps;

  const detail = async (id: string): Promise<z.input<typeof serverDetailSchema>> => {
    const row = await getServer(sql, id);
    const inventory = row.inventory === null ? null : snakeCased(row.inventory.host ?? {});
    return { ...serverView(row), inventory: inventory as Record<string, unknown> | null };
  };

  return [
    defineRoute({
      method: "get",
      path: "/api/v1/servers",
      operationId: "listServers",
      summary: "List servers",
      description: "Oldest first. Retired servers are listed only with state=retired.",
      tag,
      access: "servers:read",
      query: z.strictObject({
        ...pageQuery,
        state: serverStateSchema.optional(),
        model: lineSchema(128).min(1).optional().openapi({ description: "Part of a GPU model's name" }),
        connected: queryBoolean.optional(),
        label: labelQuery,
        q: lineSchema(128).min(1).optional().openapi({ description: "Part of name, serial or BMC address" }),
      }),
      result: pageSchema(serverSchema),
      async handle({ query }) {
        const { limit, cursor, label, ...rest } = query;
        const filter = { ...rest, labels: labelFilter(label) };
        const scope = ["servers", filter];
        const after = cursor === undefined ? undefined : decodeCursor(scope, cursor, uuidPattern);
        const rows = await listServers(sql, filter, after, limit + 1);
        return { body: pageOf(rows, limit, scope, (row) => row.id, serverView) };
      },
    }),
    defineRoute({
      method: "post",
      path: "/api/v1/servers",
      operationId: "registerServer",
      summary: "Register a server before its agent enrols",
      description:
        "The agent is matched to this record by serial number, SMBIOS UUID, MAC or BMC address, or by a join token bound to it.",
      tag,
      access: "servers:write",
      body: registrationSchema,
      status: 201,
      result: serverDetailSchema,
      problems: { 409: "The name is taken" },
      async handle({ body, principal }) {
        const id = await registerServer(
          sql,
          {
            name: body.name,
            pool: body.pool,
            serial: body.serial ?? null,
            smbiosUuid: body.smbios_uuid ?? null,
            macs: body.macs,
            bmcMac: body.bmc_mac ?? null,
            bmcAddress: body.bmc_address ?? null,
            labels: body.labels,
            site: body.site ?? null,
            rack: body.rack ?? null,
            rackUnit: body.rack_unit ?? null,
          },
          principal.actor,
        );
        context.events.poke();
        return { body: await detail(id), headers: { location: `/api/v1/servers/${id}` } };
      },
    }),
    defineRoute({
      method: "get",
      path: "/api/v1/servers/{id}",
      operationId: "getServer",
      summary: "Show a server with its inventory",
      tag,
      access: "servers:read",
      params: idParams,
      result: serverDetailSchema,
      handle: async ({ params }) => ({ body: await detail(params.id) }),
    }),
    defineRoute({
      method: "patch",
      path: "/api/v1/servers/{id}",
      operationId: "updateServer",
      summary: "Change name, labels, place or draining",
      tag,
      access: "servers:write",
      params: idParams,
      body: changeSchema,
      result: serverDetailSchema,
      problems: { 409: "The name is taken" },
      async handle({ params, body, principal }) {
        await updateServer(
          sql,
          params.id,
          {
            name: body.name,
            labels: body.labels,
            site: body.site,
            rack: body.rack,
            rackUnit: body.rack_unit,
            draining: body.draining,
          },
          principal.actor,
        );
        context.fleetChanged([params.id]);
        context.events.poke();
        return { body: await detail(params.id) };
      },
    }),
    defineRoute({
      method: "post",
      path: "/api/v1/servers/{id}/approve",
      operationId: "approveServer",
      summary: "Let a waiting agent in as this server",
      tag,
      access: "servers:write",
      params: idParams,
      body: z.strictObject({ public_key_sha256: keyChoice }),
      bodyOptional: true,
      result: enrolmentSchema,
      problems: { 409: "No agent waits for this server, or several do" },
      async handle({ params, body, principal }) {
        const options =
          body.public_key_sha256 === undefined ? {} : { publicKeySha256: body.public_key_sha256 };
        const view = await context.enrolment.approveServer(params.id, actorOf(principal), options);
        context.fleetChanged([params.id]);
        return { body: enrolmentView(view) };
      },
    }),
    defineRoute({
      method: "post",
      path: "/api/v1/servers/{id}/reject",
      operationId: "rejectServer",
      summary: "Refuse a waiting agent",
      tag,
      access: "servers:write",
      params: idParams,
      body: z.strictObject({ public_key_sha256: keyChoice, reason: lineSchema(500).optional() }),
      bodyOptional: true,
      result: enrolmentSchema,
      problems: { 409: "No agent waits for this server, or several do" },
      async handle({ params, body, principal }) {
        const view = await context.enrolment.rejectEnrolment(params.id, actorOf(principal), {
          ...(body.public_key_sha256 === undefined ? {} : { publicKeySha256: body.public_key_sha256 }),
          ...(body.reason === undefined ? {} : { reason: body.reason }),
        });
        return { body: enrolmentView(view) };
      },
    }),
    defineRoute({
      method: "get",
      path: "/api/v1/servers/{id}/enrolments",
      operationId: "listServerEnrolments",
      summary: "List agents that asked to be this server",
      tag,
      access: "servers:read",
      params: idParams,
      query: z.strictObject({ state: z.enum(["pending", "approved", "rejected"]).optional() }),
      result: pageSchema(enrolmentSchema),
      async handle({ params, query }) {
        await getServer(sql, params.id);
        const views = await context.enrolment.listEnrolments({
          serverId: params.id,
          ...(query.state === undefined ? {} : { state: query.state }),
          limit: 100,
        });
        return { body: { items: views.map(enrolmentView), next_cursor: null } };
      },
    }),
    defineRoute({
      method: "post",
      path: "/api/v1/servers/{id}/revoke-certificates",
      operationId: "revokeServerCertificates",
      summary: "Revoke every certificate of a server at once",
      description: "Its session ends, its keys cannot renew; the host needs a new key and an approval.",
      tag,
      access: "servers:write",
      params: idParams,
      body: z.strictObject({ reason: lineSchema(500).default("revoked by an operator") }),
      bodyOptional: true,
      result: z.object({ server_id: z.uuid(), revoked_count: z.number().int() }),
      async handle({ params, body, principal }) {
        await getServer(sql, params.id);
        const revoked = await context.enrolment.revokeCertificates(
          params.id,
          body.reason,
          actorOf(principal),
        );
        context.events.poke();
        return { body: { server_id: params.id, revoked_count: revoked } };
      },
    }),
    defineRoute({
      method: "post",
      path: "/api/v1/servers/{id}/retire",
      operationId: "retireServer",
      summary: "Take a server out of the fleet for good",
      description:
        "Refused while an allocation is on it. Its certificates are revoked. With `abandon_allocations` a server whose agent is unreachable takes its allocations with it: they end as failed, and its GPUs are given to nobody again until an operator makes them schedulable.",
      tag,
      access: "servers:write",
      params: idParams,
      body: z
        .strictObject({
          reason: lineSchema(500).default("retired by an operator"),
          abandon_allocations: z
            .boolean()
            .default(false)
            .openapi({ description: "End what is live on a server that is gone; needs a reason" }),
        })
        .refine(
          (body) => !body.abandon_allocations || body.reason !== "retired by an operator",
          "say the reason: tenants read it",
        ),
      bodyOptional: true,
      result: serverDetailSchema,
      problems: { 409: "An allocation is on it, or its state does not allow it" },
      async handle({ params, body, principal }) {
        const done = await retireServer(
          { sql, states: context.serverStates, allocations: context.allocations },
          {
            id: params.id,
            reason: body.reason,
            abandon: body.abandon_allocations,
            actor: actorOf(principal),
          },
        );
        if (!done.retired) {
          throw new PlatformError({
            code: "server-not-retirable",
            kind: "conflict",
            message: done.why,
            hint: done.hint,
          });
        }
        await context.enrolment.announceRevocation(params.id, body.reason);
        context.fleetChanged([params.id]);
        context.events.poke();
        return { body: await detail(params.id) };
      },
    }),
  ];
}
