import { z } from "@hono/zod-openapi";
import { serverPoolSchema } from "@palebluedot/shared/vocabulary.ts";
import type { HttpContext } from "../http/context.ts";
import { decodeCursor, pageOf, uuidPattern } from "../http/cursor.ts";
import {
  idParams,
  idSchema,
  labelMap,
  lineSchema,
  pageQuery,
  pageSchema,
  timeOf,
  timeOrNull,
  timeSchema,
} from "../http/fields.ts";
import { defineRoute, type Route } from "../http/route.ts";
import { actorOf } from "../servers/routes.ts";
import type { JoinTokenView } from "./types.ts";

const tag = "join-token";

const joinTokenSchema = z
  .object({
    id: z.uuid(),
    name: z.string(),
    auto_approve: z.boolean(),
    server_id: z.uuid().nullable(),
    max_uses: z.number().int(),
    uses: z.number().int(),
    pool: serverPoolSchema,
    labels: z.record(z.string(), z.string()),
    created_at: timeSchema,
    expires_at: timeSchema,
    revoked_at: timeSchema.nullable(),
  })
  .openapi("JoinToken");

const newJoinTokenSchema = joinTokenSchema
  .extend({
    token: z.string().openapi({ description: "Shown here and never again" }),
    ca_fingerprint: z.string().openapi({ description: "sha256 of the CA certificate: what agents pin" }),
  })
  .openapi("NewJoinToken");

const requestSchema = z
  .strictObject({
    name: lineSchema(128).min(1),
    auto_approve: z.boolean().default(false).openapi({
      description: "Unknown servers come in without an operator's approval",
    }),
    server_id: idSchema.nullable().optional().openapi({ description: "Good for this server only" }),
    max_uses: z.number().int().min(1).max(100_000).default(1),
    expires_in_seconds: z
      .number()
      .int()
      .min(60)
      .max(365 * 86_400)
      .default(86_400),
    pool: serverPoolSchema.default("container"),
    labels: labelMap.default({}),
  })
  .openapi("JoinTokenRequest");

const view = (token: JoinTokenView): z.input<typeof joinTokenSchema> => ({
  id: token.id,
  name: token.name,
  auto_approve: token.autoApprove,
  server_id: token.serverId,
  max_uses: token.maxUses,
  uses: token.uses,
  pool: token.pool,
  labels: { ...token.labels },
  created_at: timeOf(token.createdAt),
  expires_at: timeOf(token.expiresAt),
  revoked_at: timeOrNull(token.revokedAt),
});

export function joinTokenRoutes(context: HttpContext): Route[] {
  const { enrolment } = context;
  return [
    defineRoute({
      method: "get",
      path: "/api/v1/join-tokens",
      operationId: "listJoinTokens",
      summary: "List join tokens, newest first",
      tag,
      access: "join-tokens:read",
      query: z.strictObject(pageQuery),
      result: pageSchema(joinTokenSchema),
      async handle({ query }) {
        const scope = ["join-tokens"];
        const after = query.cursor === undefined ? undefined : decodeCursor(scope, query.cursor, uuidPattern);
        const rows = await enrolment.listJoinTokens({
          limit: query.limit + 1,
          ...(after === undefined ? {} : { after }),
        });
        return { body: pageOf(rows, query.limit, scope, (row) => row.id, view) };
      },
    }),
    defineRoute({
      method: "post",
      path: "/api/v1/join-tokens",
      operationId: "createJoinToken",
      summary: "Create a join token for agents",
      tag,
      access: "join-tokens:write",
      body: requestSchema,
      status: 201,
      result: newJoinTokenSchema,
      problems: { 404: "There is no such server to bind it to" },
      async handle({ body, principal }) {
        const made = await enrolment.createJoinToken(
          {
            name: body.name,
            autoApprove: body.auto_approve,
            serverId: body.server_id ?? null,
            maxUses: body.max_uses,
            expiresInSeconds: body.expires_in_seconds,
            pool: body.pool,
            labels: body.labels,
          },
          actorOf(principal),
        );
        context.events.poke();
        return {
          body: {
            ...view(made.joinToken),
            token: made.token,
            ca_fingerprint: enrolment.caFingerprint,
          },
        };
      },
    }),
    defineRoute({
      method: "delete",
      path: "/api/v1/join-tokens/{id}",
      operationId: "revokeJoinToken",
      summary: "Revoke a join token",
      tag,
      access: "join-tokens:write",
      params: idParams,
      result: joinTokenSchema,
      async handle({ params, principal }) {
        const token = await enrolment.revokeJoinToken(params.id, actorOf(principal));
        context.events.poke();
        return { body: view(token) };
      },
    }),
  ];
}
