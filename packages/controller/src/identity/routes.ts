import { z } from "@hono/zod-openapi";
import type { HttpContext } from "../http/context.ts";
import { decodeCursor, pageOf, uuidPattern } from "../http/cursor.ts";
import {
  idParams,
  idSchema,
  lineSchema,
  pageQuery,
  pageSchema,
  timeOf,
  timeOrNull,
  timeSchema,
} from "../http/fields.ts";
import { defineRoute, type Route } from "../http/route.ts";
import type { ApiToken, NewApiToken, Tenant } from "./identity.ts";
import { roles } from "./permissions.ts";

const tenantSchema = z
  .object({
    id: z.uuid(),
    name: z.string(),
    created_at: timeSchema,
    disabled_at: timeSchema.nullable(),
  })
  .openapi("Tenant");

const tokenSchema = z
  .object({
    id: z.uuid(),
    tenant_id: z.uuid().nullable(),
    name: z.string(),
    role: z.enum(roles),
    created_at: timeSchema,
    expires_at: timeSchema.nullable(),
    revoked_at: timeSchema.nullable(),
  })
  .openapi("ApiToken");

const newTokenSchema = tokenSchema
  .extend({ token: z.string().openapi({ description: "Shown here and never again" }) })
  .openapi("NewApiToken");

const tenantNameSchema = z
  .string()
  .regex(/^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$/, "lower-case letters, digits and dashes; at most 63");

const tokenNameSchema = lineSchema(128).min(1);
const expirySchema = z.iso
  .datetime({ offset: true })
  .optional()
  .openapi({ format: "date-time", description: "Absent: the token does not expire" });

const tenantTokenParams = z.strictObject({ id: idSchema, token_id: idSchema });

const tenantView = (tenant: Tenant): z.input<typeof tenantSchema> => ({
  id: tenant.id,
  name: tenant.name,
  created_at: timeOf(tenant.createdAt),
  disabled_at: timeOrNull(tenant.disabledAt),
});

const tokenView = (token: ApiToken): z.input<typeof tokenSchema> => ({
  id: token.id,
  tenant_id: token.tenantId,
  name: token.name,
  role: token.role,
  created_at: timeOf(token.createdAt),
  expires_at: timeOrNull(token.expiresAt),
  revoked_at: timeOrNull(token.revokedAt),
});

const newTokenView = (token: NewApiToken): z.input<typeof newTokenSchema> => ({
  ...tokenView(token),
  token: token.token,
});

const timeFrom = (text: string | undefined): Date | undefined =>
  text === undefined ? undefined : new Date(text);

export function identityRoutes(context: HttpContext): Route[] {
  const { identity } = context;
  return [
    defineRoute({
      method: "get",
      path: "/api/v1/whoami",
      operationId: "whoAmI",
      summary: "Show what this token is",
      tag: "identity",
      access: "self:read",
      result: z.object({
        token_id: z.uuid(),
        token_name: z.string(),
        role: z.enum(roles),
        tenant_id: z.uuid().nullable(),
        tenant_name: z.string().nullable(),
        permissions: z.array(z.string()),
      }),
      handle: ({ principal }) => ({
        body: {
          token_id: principal.tokenId,
          token_name: principal.tokenName,
          role: principal.role,
          tenant_id: principal.tenantId,
          tenant_name: principal.tenantName,
          permissions: [...principal.permissions].sort(),
        },
      }),
    }),
    defineRoute({
      method: "get",
      path: "/api/v1/tenants",
      operationId: "listTenants",
      summary: "List tenants",
      tag: "tenant",
      access: "tenants:read",
      query: z.strictObject(pageQuery),
      result: pageSchema(tenantSchema),
      async handle({ query }) {
        const scope = ["tenants"];
        const after = query.cursor === undefined ? undefined : decodeCursor(scope, query.cursor, uuidPattern);
        const rows = await identity.listTenants(after, query.limit + 1);
        return { body: pageOf(rows, query.limit, scope, (row) => row.id, tenantView) };
      },
    }),
    defineRoute({
      method: "post",
      path: "/api/v1/tenants",
      operationId: "createTenant",
      summary: "Create a tenant",
      tag: "tenant",
      access: "tenants:write",
      body: z.strictObject({ name: tenantNameSchema }).openapi("TenantRequest"),
      status: 201,
      result: tenantSchema,
      problems: { 409: "The name is taken" },
      async handle({ body, principal }) {
        const tenant = await identity.createTenant(body.name, principal.actor);
        context.events.poke();
        return { body: tenantView(tenant), headers: { location: `/api/v1/tenants/${tenant.id}` } };
      },
    }),
    defineRoute({
      method: "get",
      path: "/api/v1/tenants/{id}",
      operationId: "getTenant",
      summary: "Show a tenant",
      tag: "tenant",
      access: "tenants:read",
      params: idParams,
      result: tenantSchema,
      handle: async ({ params }) => ({ body: tenantView(await identity.getTenant(params.id)) }),
    }),
    defineRoute({
      method: "get",
      path: "/api/v1/tenants/{id}/tokens",
      operationId: "listTenantTokens",
      summary: "List a tenant's tokens",
      tag: "token",
      access: "tokens:read",
      params: idParams,
      query: z.strictObject(pageQuery),
      result: pageSchema(tokenSchema),
      async handle({ params, query }) {
        await identity.getTenant(params.id);
        const scope = ["tenant-tokens", params.id];
        const after = query.cursor === undefined ? undefined : decodeCursor(scope, query.cursor, uuidPattern);
        const rows = await identity.listTokens(params.id, after, query.limit + 1);
        return { body: pageOf(rows, query.limit, scope, (row) => row.id, tokenView) };
      },
    }),
    defineRoute({
      method: "post",
      path: "/api/v1/tenants/{id}/tokens",
      operationId: "createTenantToken",
      summary: "Create a token for a tenant",
      tag: "token",
      access: "tokens:write",
      params: idParams,
      body: z.strictObject({ name: tokenNameSchema, expires_at: expirySchema }).openapi("TenantTokenRequest"),
      status: 201,
      result: newTokenSchema,
      async handle({ params, body, principal }) {
        const token = await identity.createToken({
          tenantId: params.id,
          name: body.name,
          role: "member",
          expiresAt: timeFrom(body.expires_at),
          createdBy: principal.tokenId,
          actor: principal.actor,
        });
        context.events.poke();
        return { body: newTokenView(token) };
      },
    }),
    defineRoute({
      method: "delete",
      path: "/api/v1/tenants/{id}/tokens/{token_id}",
      operationId: "revokeTenantToken",
      summary: "Revoke a tenant's token at once",
      tag: "token",
      access: "tokens:write",
      params: tenantTokenParams,
      result: tokenSchema,
      async handle({ params, principal }) {
        const token = await identity.revokeToken(params.id, params.token_id, principal.actor);
        context.events.poke();
        return { body: tokenView(token) };
      },
    }),
    defineRoute({
      method: "get",
      path: "/api/v1/tokens",
      operationId: "listStaffTokens",
      summary: "List tokens that belong to no tenant",
      tag: "token",
      access: "tokens:read",
      query: z.strictObject(pageQuery),
      result: pageSchema(tokenSchema),
      async handle({ query }) {
        const scope = ["staff-tokens"];
        const after = query.cursor === undefined ? undefined : decodeCursor(scope, query.cursor, uuidPattern);
        const rows = await identity.listTokens(null, after, query.limit + 1);
        return { body: pageOf(rows, query.limit, scope, (row) => row.id, tokenView) };
      },
    }),
    defineRoute({
      method: "post",
      path: "/api/v1/tokens",
      operationId: "createStaffToken",
      summary: "Create a token for an admin, an operator or Prometheus",
      tag: "token",
      access: "tokens:write",
      body: z
        .strictObject({
          name: tokenNameSchema,
          role: z.enum(["admin", "operator", "metrics"]),
          expires_at: expirySchema,
        })
        .openapi("StaffTokenRequest"),
      status: 201,
      result: newTokenSchema,
      async handle({ body, principal }) {
        const token = await identity.createToken({
          tenantId: null,
          name: body.name,
          role: body.role,
          expiresAt: timeFrom(body.expires_at),
          createdBy: principal.tokenId,
          actor: principal.actor,
        });
        context.events.poke();
        return { body: newTokenView(token) };
      },
    }),
    defineRoute({
      method: "delete",
      path: "/api/v1/tokens/{id}",
      operationId: "revokeStaffToken",
      summary: "Revoke a token that belongs to no tenant, at once",
      tag: "token",
      access: "tokens:write",
      params: idParams,
      result: tokenSchema,
      async handle({ params, principal }) {
        const token = await identity.revokeToken(null, params.id, principal.actor);
        context.events.poke();
        return { body: tokenView(token) };
      },
    }),
  ];
}
