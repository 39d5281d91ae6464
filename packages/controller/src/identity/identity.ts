import { createHash, randomBytes, timingSafeEqual } from "node:crypto";
import { errorMessage, PlatformError } from "@palebluedot/shared/errors.ts";
import type { TransactionSql } from "postgres";
import { uuidv7 } from "uuidv7";
import type { Dependencies } from "../dependencies.ts";
import { appendEvents } from "../events/outbox.ts";
import { permissionsOfRole, type Principal, type Role } from "./permissions.ts";
import { createRateLimiter } from "./rate-limit.ts";

export interface Tenant {
  readonly id: string;
  readonly name: string;
  readonly createdAt: Date;
  readonly disabledAt: Date | null;
}

export interface ApiToken {
  readonly id: string;
  readonly tenantId: string | null;
  readonly name: string;
  readonly role: Role;
  readonly createdAt: Date;
  readonly expiresAt: Date | null;
  readonly revokedAt: Date | null;
}

/** A token as its maker sees it, once. */
export interface NewApiToken extends ApiToken {
  readonly token: string;
}

export interface IdentityService {
  /**
   * Who holds this bearer token. Throws `unauthenticated` (one answer for unknown, expired and revoked)
   * and `rate-limited` (too many failed tries from this address, or too many requests of this token).
   */
  authenticate(token: string, remoteAddress: string): Promise<Principal>;
  /**
   * Makes the default tenant and, when no admin token exists, one that it gives to `store` inside the
   * transaction: if it cannot be stored, it never existed. Replicas may race: one makes it.
   */
  bootstrap(store: (token: string) => Promise<void>): Promise<{ made: boolean }>;
  /** Revokes the bootstrap tokens and makes a new one. */
  resetAdminToken(store: (token: string) => Promise<void>): Promise<void>;
  createTenant(name: string, actor: string): Promise<Tenant>;
  /** By id, oldest first, `limit` at most. */
  listTenants(afterId: string | undefined, limit: number): Promise<Tenant[]>;
  /** Throws `tenant-not-found`. */
  getTenant(id: string): Promise<Tenant>;
  /** Throws `tenant-not-found`. Expiry in the past is refused. */
  createToken(request: {
    readonly tenantId: string | null;
    readonly name: string;
    readonly role: Role;
    readonly expiresAt: Date | undefined;
    readonly createdBy: string | null;
    readonly actor: string;
  }): Promise<NewApiToken>;
  /** Tokens of one tenant, or (null) of admins and operators. Hashes stay inside. */
  listTokens(tenantId: string | null, afterId: string | undefined, limit: number): Promise<ApiToken[]>;
  /** Takes effect at once on every replica. Idempotent. Throws `token-not-found`. */
  revokeToken(tenantId: string | null, tokenId: string, actor: string): Promise<ApiToken>;
  /**
   * For answers that outlive their request (streams): aborts as soon as the token is no longer good. The
   * caller ends the watch when its stream ends. Throws `too-many-streams`.
   */
  watch(tokenId: string): TokenWatch;
  stop(): void;
}

export interface TokenWatch {
  readonly signal: AbortSignal;
  end(): void;
}

export const bootstrapTokenName = "bootstrap";
export const defaultTenantName = "default";

const prefixOfRole: Readonly<Record<Role, string>> = {
  admin: "pba_",
  operator: "pbo_",
  metrics: "pbm_",
  member: "pbt_",
};
const tokenPattern = /^pb[aomt]_[A-Za-z0-9_-]{43}$/;

/** How long a token is believed without asking the database; revocation does not wait for it. */
const cacheMs = 30_000;
/** How often the tokens behind open streams are looked at, beside every revocation heard of. */
const recheckMs = 15_000;
const maxCachedTokens = 10_000;
/** Live streams of events and logs that one token may have at a replica. */
const maxStreamsPerToken = 32;
/** Failed tries from one address: a burst, then one every five seconds. */
const failureBurst = 20;
const failuresPerSecond = 0.2;
/** Any number that nobody else in the schema locks on. */
const bootstrapLock = 7_402_110;

interface CachedPrincipal {
  readonly principal: Principal;
  readonly digest: Buffer;
  readonly validUntil: number;
  readonly expiresAt: number;
}

interface TokenRow {
  id: string;
  name: string;
  role: Role;
  tenant_id: string | null;
  tenant_name: string | null;
  token_sha256: Buffer;
  expires_at: Date | null;
}

const sha256 = (token: string): Buffer => createHash("sha256").update(token).digest();

const newToken = (role: Role): string => prefixOfRole[role] + randomBytes(32).toString("base64url");

function unauthenticated(): PlatformError {
  return new PlatformError({
    code: "unauthenticated",
    kind: "unauthenticated",
    message: "the request carries no valid token",
    hint: "Send Authorization: Bearer <token>; the token may have expired or been revoked.",
  });
}

function rateLimited(seconds: number, what: string): PlatformError {
  return new PlatformError({
    code: "rate-limited",
    kind: "exhausted",
    message: `too many ${what}`,
    hint: "Wait for the time in Retry-After, then try again.",
    details: { retry_after_seconds: Math.max(1, Math.ceil(seconds)) },
  });
}

export function tenantNotFound(id: string): PlatformError {
  return new PlatformError({
    code: "tenant-not-found",
    kind: "not-found",
    message: `there is no tenant ${id}`,
    hint: "GET /api/v1/tenants lists them.",
  });
}

type TokenColumns = Omit<ApiToken, "createdAt"> & { readonly createdAt: Date };

const toToken = (row: TokenColumns): ApiToken => ({
  id: row.id,
  tenantId: row.tenantId,
  name: row.name,
  role: row.role,
  createdAt: row.createdAt,
  expiresAt: row.expiresAt,
  revokedAt: row.revokedAt,
});

async function insertToken(
  tx: TransactionSql,
  row: {
    tenantId: string | null;
    name: string;
    role: Role;
    expiresAt: Date | null;
    createdBy: string | null;
    actor: string;
  },
): Promise<NewApiToken> {
  const token = newToken(row.role);
  const id = uuidv7();
  const inserted = await tx<TokenColumns[]>`
    insert into api_tokens (id, tenant_id, name, role, token_sha256, created_by, expires_at)
    values (${id}, ${row.tenantId}, ${row.name}, ${row.role}, ${sha256(token)}, ${row.createdBy}, ${row.expiresAt})
    returning id, tenant_id as "tenantId", name, role, created_at as "createdAt",
              expires_at as "expiresAt", revoked_at as "revokedAt"`;
  await appendEvents(tx, [
    {
      type: "token.created",
      tenantId: row.tenantId,
      actor: row.actor,
      message: `token "${row.name}" (${row.role}) was created`,
      data: { token_id: id, role: row.role, name: row.name },
    },
  ]);
  const columns = inserted[0];
  if (columns === undefined) throw new Error("the new token was not returned");
  return { ...toToken(columns), token };
}

async function insertDefaultTenant(tx: TransactionSql): Promise<void> {
  await tx`
    insert into tenants (id, name) values (${uuidv7()}, ${defaultTenantName})
    on conflict (name) do nothing`;
}

export function createIdentityService(
  deps: Pick<Dependencies, "sql" | "clock" | "log" | "notifications" | "config">,
): IdentityService {
  const { sql, clock } = deps;
  const perSecond = deps.config.PALEBLUEDOT_RATE_LIMIT_PER_SECOND;
  const requests = createRateLimiter({ clock, perSecond, burst: perSecond * 2 });
  const failures = createRateLimiter({ clock, perSecond: failuresPerSecond, burst: failureBurst });
  const cache = new Map<string, CachedPrincipal>();
  // Grows with every revocation heard of: an answer read before it is not cached after it.
  let cacheEpoch = 0;

  function forget(payload: string): void {
    cacheEpoch += 1;
    recheckSoon();
    if (payload === "*") {
      cache.clear();
      return;
    }
    const ids = new Set(payload.split(","));
    for (const [key, entry] of cache) if (ids.has(entry.principal.tokenId)) cache.delete(key);
  }

  const watched = new Map<string, Set<AbortController>>();
  let rechecking: Promise<void> | undefined;

  /** Ends the streams of tokens that are no longer good: revoked, expired, or of a disabled tenant. */
  async function recheckWatched(): Promise<void> {
    if (watched.size === 0) return;
    const ids = [...watched.keys()];
    const good = await sql<{ id: string }[]>`
      select t.id from api_tokens t left join tenants n on n.id = t.tenant_id
      where t.id = any(${ids}::uuid[]) and t.revoked_at is null and n.disabled_at is null
        and (t.expires_at is null or t.expires_at > ${new Date(clock.now())})`;
    const goodIds = new Set(good.map((row) => row.id));
    for (const id of ids) {
      if (goodIds.has(id)) continue;
      for (const controller of watched.get(id) ?? []) controller.abort(unauthenticated());
      watched.delete(id);
    }
  }

  function recheckSoon(): void {
    rechecking ??= recheckWatched()
      .catch((error: unknown) => {
        // The next round tries again; a database that is away keeps streams open, not closed to others.
        deps.log.warn({ error: errorMessage(error) }, "tokens of open streams cannot be checked");
      })
      .finally(() => {
        rechecking = undefined;
      });
  }
  const recheckTimer = setInterval(recheckSoon, recheckMs).unref();

  const stopListening = deps.notifications.listen("identity", forget, () => {
    // A revocation may have been missed while the connection was away.
    forget("*");
  });

  async function lookUp(token: string, key: string): Promise<Principal | undefined> {
    const digest = sha256(token);
    const epoch = cacheEpoch;
    const rows = await sql<TokenRow[]>`
      select t.id, t.name, t.role, t.tenant_id, n.name as tenant_name, t.token_sha256, t.expires_at
      from api_tokens t left join tenants n on n.id = t.tenant_id
      where t.token_sha256 = ${digest} and t.revoked_at is null and n.disabled_at is null`;
    const row = rows[0];
    if (row === undefined || !timingSafeEqual(row.token_sha256, digest)) return undefined;
    const expiresAt = row.expires_at?.getTime() ?? Number.POSITIVE_INFINITY;
    if (expiresAt <= clock.now()) return undefined;
    const principal: Principal = {
      tokenId: row.id,
      tokenName: row.name,
      role: row.role,
      tenantId: row.tenant_id,
      tenantName: row.tenant_name,
      permissions: permissionsOfRole[row.role],
      actor: `token:${row.id}`,
    };
    if (epoch === cacheEpoch) {
      cache.delete(key);
      cache.set(key, { principal, digest, validUntil: clock.now() + cacheMs, expiresAt });
      if (cache.size > maxCachedTokens) {
        const oldest = cache.keys().next();
        if (!oldest.done) cache.delete(oldest.value);
      }
    }
    return principal;
  }

  const bootstrapToken = {
    tenantId: null,
    name: bootstrapTokenName,
    role: "admin",
    expiresAt: null,
    createdBy: null,
    actor: "system",
  } as const;

  return {
    async authenticate(token, remoteAddress) {
      if (!tokenPattern.test(token)) {
        const wait = failures.take(remoteAddress);
        if (wait > 0) throw rateLimited(wait, "failed authentications from this address");
        throw unauthenticated();
      }
      // The digest is the key: the map holds no token, and looking one up tells nothing of others.
      const key = sha256(token).toString("base64");
      const cached = cache.get(key);
      let principal: Principal | undefined;
      if (cached !== undefined && cached.expiresAt > clock.now() && cached.validUntil > clock.now()) {
        principal = cached.principal;
      } else {
        // A token known to be good before is looked up even while its address is being punished.
        const wait = cached === undefined ? failures.peek(remoteAddress) : 0;
        if (wait > 0) throw rateLimited(wait, "failed authentications from this address");
        principal = await lookUp(token, key);
      }
      if (principal === undefined) {
        cache.delete(key);
        failures.take(remoteAddress);
        throw unauthenticated();
      }
      const wait = requests.take(principal.tokenId);
      if (wait > 0) throw rateLimited(wait, "requests with this token");
      return principal;
    },

    bootstrap: (store) =>
      sql.begin(async (tx) => {
        await tx`select pg_advisory_xact_lock(${bootstrapLock})`;
        await insertDefaultTenant(tx);
        const existing = await tx`
          select 1 from api_tokens
          where role = 'admin' and revoked_at is null and (expires_at is null or expires_at > now()) limit 1`;
        if (existing.length > 0) return { made: false };
        const made = await insertToken(tx, bootstrapToken);
        await store(made.token);
        return { made: true };
      }),

    async resetAdminToken(store) {
      await sql.begin(async (tx) => {
        await tx`select pg_advisory_xact_lock(${bootstrapLock})`;
        await insertDefaultTenant(tx);
        await tx`
          update api_tokens set revoked_at = now()
          where role = 'admin' and name = ${bootstrapTokenName} and revoked_at is null`;
        const made = await insertToken(tx, bootstrapToken);
        await store(made.token);
      });
      await deps.notifications.notify("identity", "*");
    },

    createTenant: (name, actor) =>
      sql.begin(async (tx) => {
        const id = uuidv7();
        const rows = await tx<Tenant[]>`
          insert into tenants (id, name) values (${id}, ${name}) on conflict (name) do nothing
          returning id, name, created_at as "createdAt", disabled_at as "disabledAt"`;
        const tenant = rows[0];
        if (tenant === undefined) {
          throw new PlatformError({
            code: "tenant-name-taken",
            kind: "conflict",
            message: `there is a tenant "${name}" already`,
            hint: "Choose another name, or use the existing tenant.",
          });
        }
        await appendEvents(tx, [
          {
            type: "tenant.created",
            tenantId: id,
            actor,
            message: `tenant "${name}" was created`,
            data: { name },
          },
        ]);
        return tenant;
      }),

    listTenants: (afterId, limit) => sql<Tenant[]>`
      select id, name, created_at as "createdAt", disabled_at as "disabledAt" from tenants
      where ${afterId === undefined ? sql`true` : sql`id > ${afterId}`}
      order by id limit ${limit}`,

    async getTenant(id) {
      const rows = await sql<Tenant[]>`
        select id, name, created_at as "createdAt", disabled_at as "disabledAt" from tenants where id = ${id}`;
      const tenant = rows[0];
      if (tenant === undefined) throw tenantNotFound(id);
      return tenant;
    },

    async createToken(request) {
      if (request.expiresAt !== undefined && request.expiresAt.getTime() <= clock.now()) {
        throw new PlatformError({
          code: "expiry-in-the-past",
          kind: "invalid",
          status: 422,
          message: "expires_at lies in the past",
          hint: "Give a time in the future, or leave it out for a token without expiry.",
        });
      }
      const { tenantId } = request;
      return await sql.begin(async (tx) => {
        if (tenantId !== null) {
          const found = await tx`select 1 from tenants where id = ${tenantId} for share`;
          if (found.length === 0) throw tenantNotFound(tenantId);
        }
        return await insertToken(tx, { ...request, expiresAt: request.expiresAt ?? null });
      });
    },

    listTokens: (tenantId, afterId, limit) => sql<ApiToken[]>`
      select id, tenant_id as "tenantId", name, role, created_at as "createdAt",
             expires_at as "expiresAt", revoked_at as "revokedAt"
      from api_tokens
      where tenant_id is not distinct from ${tenantId}
        and ${afterId === undefined ? sql`true` : sql`id > ${afterId}`}
      order by id limit ${limit}`,

    async revokeToken(tenantId, tokenId, actor) {
      const token = await sql.begin(async (tx) => {
        const rows = await tx<TokenColumns[]>`
          update api_tokens set revoked_at = coalesce(revoked_at, now())
          where id = ${tokenId} and tenant_id is not distinct from ${tenantId}
          returning id, tenant_id as "tenantId", name, role, created_at as "createdAt",
                    expires_at as "expiresAt", revoked_at as "revokedAt"`;
        const row = rows[0];
        if (row === undefined) {
          throw new PlatformError({
            code: "token-not-found",
            kind: "not-found",
            message: `there is no token ${tokenId} here`,
            hint: "List the tokens to find its id.",
          });
        }
        await appendEvents(tx, [
          {
            type: "token.revoked",
            tenantId,
            actor,
            message: `token "${row.name}" (${row.role}) was revoked`,
            data: { token_id: tokenId, name: row.name },
          },
        ]);
        return toToken(row);
      });
      // This replica at once; the others by the hint.
      forget(tokenId);
      await deps.notifications.notify("identity", tokenId);
      return token;
    },

    watch(tokenId) {
      const controller = new AbortController();
      const set = watched.get(tokenId) ?? new Set();
      if (set.size >= maxStreamsPerToken) {
        throw new PlatformError({
          code: "too-many-streams",
          kind: "exhausted",
          message: `this token has ${maxStreamsPerToken} live streams of events and logs open`,
          hint: "End some of them; one stream of events can serve many readers.",
        });
      }
      set.add(controller);
      watched.set(tokenId, set);
      return {
        signal: controller.signal,
        end() {
          set.delete(controller);
          if (set.size === 0 && watched.get(tokenId) === set) watched.delete(tokenId);
        },
      };
    },

    stop() {
      clearInterval(recheckTimer);
      stopListening();
    },
  };
}
