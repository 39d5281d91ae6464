import { z } from "@hono/zod-openapi";
import {
  allocationExtensionSchema,
  allocationRequestSchema,
  allocationSchema,
} from "@palebluedot/shared/allocation-request.ts";
import { PlatformError } from "@palebluedot/shared/errors.ts";
import { allocationStateSchema } from "@palebluedot/shared/vocabulary.ts";
import type { HttpContext } from "../http/context.ts";
import { decodeCursor, encodeCursor, uuidPattern } from "../http/cursor.ts";
import {
  idParams,
  idSchema,
  lineSchema,
  pageQuery,
  pageSchema,
  queryBoolean,
  queryInteger,
} from "../http/fields.ts";
import { defineRoute, type Route } from "../http/route.ts";
import type { Principal } from "../identity/permissions.ts";
import { defaultTenantName } from "../identity/identity.ts";
import { logResponse } from "./logs.ts";
import type { AllocationCaller } from "./types.ts";

const tag = "allocation";
const resultSchema = allocationSchema.meta({ id: "Allocation" });
const requestSchema = allocationRequestSchema.meta({ id: "AllocationRequest" });
const extensionSchema = allocationExtensionSchema.meta({ id: "AllocationExtension" });
const keyPattern = /^[\x21-\x7e]{1,255}$/;
const maxTailLines = 100_000;

/** Operators see every tenant's; everybody else what belongs to the token's own tenant. */
function callerOf(principal: Principal): AllocationCaller {
  const common = { actor: principal.actor, tokenId: principal.tokenId };
  if (principal.permissions.has("allocations:all")) return { ...common, tenantId: undefined };
  if (principal.tenantId !== null) return { ...common, tenantId: principal.tenantId };
  throw new PlatformError({
    code: "permission-missing",
    kind: "forbidden",
    message: "this token belongs to no tenant",
    hint: "Use a tenant's token.",
  });
}

function idempotencyKey(header: string | undefined): string | undefined {
  if (header === undefined) return undefined;
  if (keyPattern.test(header)) return header;
  throw new PlatformError({
    code: "invalid-idempotency-key",
    kind: "invalid",
    message: "Idempotency-Key must be 1 to 255 printable ASCII characters without spaces",
    hint: "A UUID does well.",
  });
}

export function allocationRoutes(context: HttpContext): Route[] {
  const { allocations } = context;
  let defaultTenant: string | undefined;

  /** Tenants' tokens act for their tenant; admins may name one, and act for the default one if they do not. */
  async function tenantFor(principal: Principal, named: string | undefined): Promise<string> {
    if (principal.tenantId !== null) {
      if (named === undefined || named === principal.tenantId) return principal.tenantId;
      throw new PlatformError({
        code: "tenant-not-found",
        kind: "not-found",
        message: `there is no tenant ${named} for this token`,
        hint: "Leave tenant_id out: the token says whose allocation it is.",
      });
    }
    if (named !== undefined) return (await context.identity.getTenant(named)).id;
    if (defaultTenant === undefined) {
      const rows = await context.deps.sql<{ id: string }[]>`
        select id from tenants where name = ${defaultTenantName}`;
      defaultTenant = rows[0]?.id;
    }
    if (defaultTenant === undefined) {
      throw new PlatformError({
        code: "tenant-required",
        kind: "invalid",
        status: 422,
        message: "tenant_id is needed: there is no default tenant",
        hint: "GET /api/v1/tenants lists them.",
      });
    }
    return defaultTenant;
  }

  return [
    defineRoute({
      method: "post",
      path: "/api/v1/allocations",
      operationId: "createAllocation",
      summary: "Ask for GPUs with a container",
      description:
        "Accepted at once as `queued`; message says what it waits for. With `Idempotency-Key` a repeated request within 24 hours answers with the first one's allocation.",
      tag,
      access: "allocations:write",
      headers: z.object({ "Idempotency-Key": z.string().max(255).optional() }),
      body: requestSchema,
      status: 202,
      result: resultSchema,
      problems: {
        404: "There is no such tenant",
        422: "The body does not fit the schema, or the Idempotency-Key was used with another body",
      },
      async handle({ body, principal, header }) {
        if (body.priority !== 0 && !principal.permissions.has("allocations:priority")) {
          throw new PlatformError({
            code: "priority-not-allowed",
            kind: "forbidden",
            message: "this token may not ask for a priority",
            hint: "Leave priority out, or ask an operator to make the allocation for your tenant.",
          });
        }
        const key = idempotencyKey(header("idempotency-key"));
        const tenantId = await tenantFor(principal, body.tenant_id);
        const { tenant_id: _named, ...request } = body;
        const made = await allocations.create(
          callerOf(principal),
          // A tenant's own token says it all; who belongs to none says for whom.
          principal.tenantId === null ? { ...request, tenant_id: tenantId } : request,
          key === undefined ? {} : { idempotencyKey: key },
        );
        context.events.poke();
        return {
          body: made.allocation,
          headers: {
            location: `/api/v1/allocations/${made.allocation.id}`,
            ...(made.created ? {} : { "idempotent-replayed": "true" }),
          },
        };
      },
    }),
    defineRoute({
      method: "get",
      path: "/api/v1/allocations",
      operationId: "listAllocations",
      summary: "List allocations, newest first",
      tag,
      access: "allocations:read",
      query: z.strictObject({
        ...pageQuery,
        state: z
          .union([allocationStateSchema, z.array(allocationStateSchema).max(6)])
          .transform((value) => (Array.isArray(value) ? value : [value]))
          .optional()
          .openapi({
            type: "array",
            items: { type: "string", enum: [...allocationStateSchema.options] },
            description: "Repeated: any of them",
          }),
        server_id: idSchema.optional(),
        name: lineSchema(128).min(1).optional(),
        tenant_id: idSchema.optional().openapi({ description: "For operators" }),
      }),
      result: pageSchema(resultSchema),
      async handle({ query, principal }) {
        const caller = callerOf(principal);
        // A tenant that names another sees what it would see of a tenant that does not exist: nothing.
        if (
          caller.tenantId !== undefined &&
          query.tenant_id !== undefined &&
          query.tenant_id !== caller.tenantId
        ) {
          return { body: { items: [], next_cursor: null } };
        }
        const filter = {
          tenantId: caller.tenantId ?? query.tenant_id,
          states: query.state,
          serverId: query.server_id,
          name: query.name,
        };
        const scope = ["allocations", filter];
        const afterId =
          query.cursor === undefined ? undefined : decodeCursor(scope, query.cursor, uuidPattern);
        const rows = await allocations.list(caller, { ...filter, afterId, limit: query.limit });
        const last = rows.at(-1);
        // A full page may be the last one; the next is then empty.
        const more = rows.length >= query.limit && last !== undefined;
        return {
          body: { items: rows, next_cursor: more ? encodeCursor(scope, last.id) : null },
        };
      },
    }),
    defineRoute({
      method: "get",
      path: "/api/v1/allocations/{id}",
      operationId: "getAllocation",
      summary: "Show an allocation",
      tag,
      access: "allocations:read",
      params: idParams,
      result: resultSchema,
      handle: async ({ params, principal }) => ({
        body: await allocations.get(callerOf(principal), params.id),
      }),
    }),
    defineRoute({
      method: "delete",
      path: "/api/v1/allocations/{id}",
      operationId: "releaseAllocation",
      summary: "Release an allocation",
      description:
        "A queued one ends at once; another stops its container, and its GPUs are free again when they were verified clean. Calling twice is safe.",
      tag,
      access: "allocations:write",
      params: idParams,
      status: 202,
      result: resultSchema,
      async handle({ params, principal }) {
        const allocation = await allocations.release(callerOf(principal), params.id);
        context.events.poke();
        return { body: allocation };
      },
    }),
    defineRoute({
      method: "post",
      path: "/api/v1/allocations/{id}/extend",
      operationId: "extendAllocation",
      summary: "Extend the lease",
      tag,
      access: "allocations:write",
      params: idParams,
      body: extensionSchema,
      result: resultSchema,
      problems: { 409: "It is releasing or ended" },
      async handle({ params, body, principal }) {
        const allocation = await allocations.extend(callerOf(principal), params.id, body.extend_seconds);
        context.events.poke();
        return { body: allocation };
      },
    }),
    defineRoute({
      method: "get",
      path: "/api/v1/allocations/{id}/logs",
      operationId: "streamAllocationLogs",
      summary: "Read or follow the container's output",
      description:
        "As text (both streams as they came), or with `Accept: application/x-ndjson` one JSON object a line: {stream, data}. When the container is gone, the last 16 KiB that were kept of it for 30 days, with the header `Palebluedot-Output: end` (stream: merged); `since` and `timestamps` do nothing then.",
      tag,
      access: "allocations:read",
      params: idParams,
      query: z.strictObject({
        follow: queryBoolean.default(false).openapi({ type: "boolean", default: false }),
        tail: queryInteger(1, maxTailLines)
          .optional()
          .openapi({ type: "integer", minimum: 1, description: "Last lines only; absent: from the start" }),
        since: z.iso
          .datetime({ offset: true })
          .optional()
          .openapi({ format: "date-time", description: "Output from this time on" }),
        timestamps: queryBoolean.default(false).openapi({ type: "boolean", default: false }),
      }),
      media: ["text/plain", "application/x-ndjson"],
      problems: { 409: "It has no container and no kept output, or its server's agent is not connected" },
      async handle({ params, query, principal, header, signal }) {
        const allocation = await allocations.get(callerOf(principal), params.id);
        return await logResponse(context, {
          allocation,
          outputTail: () => allocations.outputTail(callerOf(principal), params.id),
          follow: query.follow,
          tailLines: query.tail ?? 0,
          sinceUnixMs: query.since === undefined ? 0 : Date.parse(query.since),
          timestamps: query.timestamps,
          asJson: /\bapplication\/(x-ndjson|jsonl?)\b/i.test(header("accept") ?? ""),
          tokenId: principal.tokenId,
          signal,
        });
      },
    }),
  ];
}
