import { createHash, randomBytes } from "node:crypto";
import { PlatformError } from "@palebluedot/shared/errors.ts";
import { labelsSchema, serverPoolSchema, type ServerPool } from "@palebluedot/shared/vocabulary.ts";
import type { ISql, Sql } from "postgres";
import { uuidv7 } from "uuidv7";
import { z } from "zod";
import { appendEvents } from "../events/outbox.ts";
import type { Actor, JoinTokenView, NewJoinToken, PageRequest } from "./types.ts";

const day = 86_400;

const newJoinTokenSchema = z
  .strictObject({
    name: z
      .string()
      .min(1)
      .max(128)
      .regex(/^[^\p{Cc}]*$/u),
    autoApprove: z.boolean().default(false),
    serverId: z.uuid().nullable().default(null),
    maxUses: z.number().int().min(1).max(100_000).default(1),
    expiresInSeconds: z
      .number()
      .int()
      .min(1)
      .max(366 * day)
      .default(day),
    pool: serverPoolSchema.default("container"),
    labels: labelsSchema.default({}),
  })
  .refine((token) => token.serverId === null || token.maxUses === 1, {
    // It stands for the operator's approval of one host, so it must not serve a second one.
    message: "a token bound to a server has exactly one use",
    path: ["maxUses"],
  });

export const joinTokenPrefix = "pbj_";

/** Tokens are 256 random bits: a plain hash is enough, there is nothing to guess. */
export function hashJoinToken(token: string): Buffer {
  return createHash("sha256").update(token).digest();
}

interface JoinTokenRow {
  id: string;
  name: string;
  auto_approve: boolean;
  server_id: string | null;
  max_uses: number;
  uses: number;
  pool: ServerPool;
  labels: Record<string, string>;
  created_at: Date;
  created_by: string | null;
  expires_at: Date;
  revoked_at: Date | null;
}

function view(row: JoinTokenRow): JoinTokenView {
  return {
    id: row.id,
    name: row.name,
    autoApprove: row.auto_approve,
    serverId: row.server_id,
    maxUses: row.max_uses,
    uses: row.uses,
    pool: row.pool,
    labels: row.labels,
    createdAt: row.created_at,
    createdBy: row.created_by,
    expiresAt: row.expires_at,
    revokedAt: row.revoked_at,
  };
}

function columns(sql: ISql): ReturnType<ISql> {
  return sql`id, name, auto_approve, server_id, max_uses, uses, pool, labels, created_at, created_by, expires_at, revoked_at`;
}

export async function createJoinToken(
  sql: Sql,
  input: NewJoinToken,
  actor: Actor,
): Promise<{ readonly token: string; readonly joinToken: JoinTokenView }> {
  const parsed = newJoinTokenSchema.safeParse(input);
  if (!parsed.success) {
    throw new PlatformError({
      code: "join-token-invalid",
      kind: "invalid",
      message: z.prettifyError(parsed.error),
      hint: "max_uses 1..100000 (1 when bound to a server), expiry at most a year.",
      details: {
        errors: parsed.error.issues.map((issue) => ({ path: issue.path.join("."), message: issue.message })),
      },
    });
  }
  const wanted = parsed.data;
  const token = joinTokenPrefix + randomBytes(32).toString("base64url");
  return await sql.begin(async (tx) => {
    if (wanted.serverId !== null) {
      const [server] = await tx`select 1 from servers where id = ${wanted.serverId} and state <> 'retired'`;
      if (server === undefined) throw serverNotFound(wanted.serverId);
    }
    const [row] = await tx<JoinTokenRow[]>`
      insert into join_tokens (id, name, token_sha256, auto_approve, server_id, max_uses, pool, labels, created_by, expires_at)
      values (${uuidv7()}, ${wanted.name}, ${hashJoinToken(token)}, ${wanted.autoApprove}, ${wanted.serverId},
        ${wanted.maxUses}, ${wanted.pool}, ${tx.json(wanted.labels)}, ${actor.id ?? null},
        now() + make_interval(secs => ${wanted.expiresInSeconds}))
      returning ${columns(tx)}`;
    if (row === undefined) throw new Error("insert returned nothing");
    await appendEvents(tx, [
      {
        type: "join-token.created",
        serverId: row.server_id,
        actor: actor.name,
        message: `join token ${row.name} created`,
        data: { join_token_id: row.id, max_uses: row.max_uses, auto_approve: row.auto_approve },
      },
    ]);
    return { token, joinToken: view(row) };
  });
}

export async function listJoinTokens(sql: Sql, page: PageRequest): Promise<readonly JoinTokenView[]> {
  const rows = await sql<JoinTokenRow[]>`
    select ${columns(sql)} from join_tokens
    where ${page.after === undefined ? sql`true` : sql`id < ${page.after}`}
    order by id desc limit ${page.limit}`;
  return rows.map(view);
}

export async function revokeJoinToken(sql: Sql, id: string, actor: Actor): Promise<JoinTokenView> {
  return await sql.begin(async (tx) => {
    const [before] = await tx<{ revoked_at: Date | null }[]>`
      select revoked_at from join_tokens where id = ${id} for update`;
    if (before === undefined) {
      throw new PlatformError({
        code: "join-token-not-found",
        kind: "not-found",
        message: "there is no join token with this id",
        hint: "List them: pbd join-token list",
      });
    }
    const [row] = await tx<JoinTokenRow[]>`
      update join_tokens set revoked_at = coalesce(revoked_at, now()) where id = ${id} returning ${columns(tx)}`;
    if (row === undefined) throw new Error("update returned nothing");
    if (before.revoked_at === null) {
      await appendEvents(tx, [
        {
          type: "join-token.revoked",
          serverId: row.server_id,
          actor: actor.name,
          message: `join token ${row.name} revoked`,
          data: { join_token_id: row.id },
        },
      ]);
    }
    return view(row);
  });
}

export function serverNotFound(id: string): PlatformError {
  return new PlatformError({
    code: "server-not-found",
    kind: "not-found",
    message: `there is no server ${id}`,
    hint: "List them: pbd servers list",
  });
}
