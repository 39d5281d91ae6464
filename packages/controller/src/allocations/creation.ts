import { createHash } from "node:crypto";
import type { Allocation, AllocationRequest, StoredRequest } from "@palebluedot/shared/allocation-request.ts";
import { PlatformError } from "@palebluedot/shared/errors.ts";
import type { SecretBox } from "@palebluedot/shared/secret-box.ts";
import type { Sql } from "postgres";
import { uuidv7 } from "uuidv7";
import { idempotencyHours } from "../reconciler/periodic.ts";
import { secretContext, type AllocationSecrets } from "./desired-state.ts";
import { allocationStateMachine } from "./state-machine.ts";
import type { AllocationCaller } from "./types.ts";

/** One POST, ready to be written. */
export interface NewAllocation {
  readonly id: string;
  readonly tenantId: string;
  readonly key: string | undefined;
  readonly requestSha256: string;
  readonly name: string;
  readonly request: StoredRequest;
  readonly secretsEncrypted: Buffer | undefined;
  readonly priority: number;
  readonly leaseSeconds: number;
  readonly createdAt: number;
  readonly createdBy: string | undefined;
  readonly actor: string;
}

export type CreationResult =
  | { readonly kind: "created" }
  | { readonly kind: "repeated"; readonly allocationId: string }
  | { readonly kind: "key-reused" }
  | { readonly kind: "tenant-unknown" };

export const queuedMessage = "waiting for the scheduler";

/** The same request gives the same digest, whatever the order of its members. */
function digest(value: unknown): string {
  const sorted = JSON.stringify(value, (_key, member: unknown) =>
    typeof member === "object" && member !== null && !Array.isArray(member)
      ? Object.fromEntries(Object.entries(member).sort(([left], [right]) => (left < right ? -1 : 1)))
      : member,
  );
  return createHash("sha256").update(sorted).digest("hex");
}

export function prepareAllocation(
  caller: AllocationCaller,
  request: AllocationRequest,
  key: string | undefined,
  context: { readonly now: number; readonly secrets: SecretBox },
): NewAllocation {
  if (
    caller.tenantId !== undefined &&
    request.tenant_id !== undefined &&
    request.tenant_id !== caller.tenantId
  ) {
    throw new PlatformError({
      code: "tenant-forbidden",
      kind: "forbidden",
      message: "tenant_id is not the tenant of this credential",
      hint: "Leave tenant_id out: the credential decides.",
    });
  }
  const tenantId = caller.tenantId ?? request.tenant_id;
  if (tenantId === undefined) {
    throw new PlatformError({
      code: "tenant-required",
      kind: "invalid",
      status: 422,
      message: "this credential belongs to no tenant, so tenant_id is needed",
      hint: "Set tenant_id, or use a tenant's own token.",
    });
  }
  if (key !== undefined && !/^[\x21-\x7e]{1,255}$/.test(key)) {
    throw new PlatformError({
      code: "idempotency-key-invalid",
      kind: "invalid",
      message: "an Idempotency-Key has 1 to 255 visible ASCII characters",
      hint: "A random UUID is a good key.",
    });
  }
  const id = uuidv7();
  const { secret_environment: secretEnvironment, registry, ...container } = request.container;
  const secrets: AllocationSecrets = {
    environment: secretEnvironment,
    ...(registry === undefined ? {} : { registry_password: registry.password }),
  };
  const hasSecrets = Object.keys(secretEnvironment).length > 0 || registry !== undefined;
  return {
    id,
    tenantId,
    key,
    requestSha256: digest({ ...request, tenant_id: tenantId }),
    name: request.name,
    request: {
      gpus: request.gpus,
      container: {
        ...container,
        secret_environment_names: Object.keys(secretEnvironment).sort(),
        ...(registry === undefined
          ? {}
          : { registry: { server: registry.server, username: registry.username } }),
      },
    },
    secretsEncrypted: hasSecrets
      ? context.secrets.seal(Buffer.from(JSON.stringify(secrets)), secretContext(id))
      : undefined,
    priority: request.priority,
    leaseSeconds: request.lease_seconds,
    createdAt: context.now,
    createdBy: caller.tokenId,
    actor: caller.actor,
  };
}

/**
 * Writes a batch in one statement: allocation, idempotency key, event and queue row together or not at all.
 * A repeated key finds the allocation of the first time.
 */
export async function insertAllocations(
  sql: Sql,
  allocations: readonly NewAllocation[],
): Promise<CreationResult[]> {
  const results = await insertOnce(sql, allocations);
  const expired = allocations.filter((_, position) => results[position] === "expired-key");
  if (expired.length === 0) return results as CreationResult[];
  // Keys older than a day that the purge has not reached: forget them and write again.
  await sql`
    delete from idempotency_keys using jsonb_to_recordset(${JSON.stringify(
      expired.map((allocation) => ({ tenant_id: allocation.tenantId, key: allocation.key })),
    )}::text::jsonb) as input(tenant_id uuid, key text)
    where idempotency_keys.tenant_id = input.tenant_id and idempotency_keys.key = input.key
      and idempotency_keys.created_at < now() - ${idempotencyHours} * interval '1 hour'`;
  const second = await insertOnce(sql, expired);
  return results.map((result) => {
    if (result !== "expired-key") return result;
    const again = second.shift();
    if (again === undefined || again === "expired-key")
      throw new Error("an expired idempotency key came back");
    return again;
  });
}

async function insertOnce(
  sql: Sql,
  allocations: readonly NewAllocation[],
): Promise<(CreationResult | "expired-key")[]> {
  const input = JSON.stringify(
    allocations.map((allocation) => ({
      id: allocation.id,
      tenant_id: allocation.tenantId,
      key: allocation.key ?? null,
      request_sha256: allocation.requestSha256,
      name: allocation.name,
      request: allocation.request,
      secrets: allocation.secretsEncrypted?.toString("hex") ?? null,
      priority: allocation.priority,
      lease_seconds: allocation.leaseSeconds,
      created_at: new Date(allocation.createdAt).toISOString(),
      created_by: allocation.createdBy ?? null,
      actor: allocation.actor,
      event_id: uuidv7(),
    })),
  );
  const rows = await sql<{ id: string; created: boolean; tenant_known: boolean }[]>`
    with input as materialized (
      select * from jsonb_to_recordset(${input}::text::jsonb) as input(
        id uuid, tenant_id uuid, key text, request_sha256 text, name text, request jsonb, secrets text,
        priority integer, lease_seconds integer, created_at timestamptz, created_by uuid, actor text, event_id uuid)
    ), accepted as materialized (
      select input.* from input join tenants on tenants.id = input.tenant_id and tenants.disabled_at is null
    ), keyed as (
      insert into idempotency_keys (tenant_id, key, request_sha256, allocation_id)
      select tenant_id, key, decode(request_sha256, 'hex'), id from accepted where key is not null
      -- One order for all, so that two batches with the same keys do not wait for each other in a circle.
      order by tenant_id, key
      on conflict do nothing returning allocation_id
    ), created as (
      insert into allocations (id, tenant_id, name, state, state_since, message, request, secrets_encrypted,
        priority, lease_seconds, created_at, created_by)
      select id, tenant_id, name, 'queued', created_at, ${queuedMessage}, request, decode(secrets, 'hex'),
        priority, lease_seconds, created_at, created_by
      from accepted where key is null or id in (select allocation_id from keyed)
      returning id
    ), told as (
      insert into outbox (id, type, tenant_id, allocation_id, actor, message, data, occurred_at)
      select event_id, 'allocation.queued', tenant_id, id, actor, 'asked for ' || (request -> 'gpus' ->> 'count') || ' GPU(s)',
        jsonb_build_object('to', 'queued', 'name', name, 'gpus', request -> 'gpus'), created_at
      from accepted where id in (select id from created)
    ), due as (
      insert into reconcile_queue (kind, key, due_at)
      select 'allocation', id, created_at + ${allocationStateMachine.queued.allowanceMs ?? 600_000} * interval '1 millisecond'
      from accepted where id in (select id from created)
    )
    select input.id, created.id is not null as created, accepted.id is not null as tenant_known
    from input left join created on created.id = input.id left join accepted on accepted.id = input.id`;
  const byId = new Map(rows.map((row) => [row.id, row]));
  const repeated = allocations.filter((allocation) => {
    const row = byId.get(allocation.id);
    return row !== undefined && row.tenant_known && !row.created;
  });
  const keys = await findKeys(sql, repeated);
  return allocations.map((allocation) => {
    const row = byId.get(allocation.id);
    if (row === undefined) throw new Error("an allocation is missing in the answer");
    if (!row.tenant_known) return { kind: "tenant-unknown" };
    if (row.created) return { kind: "created" };
    const found = keys.get(`${allocation.tenantId} ${allocation.key ?? ""}`);
    if (found === undefined || found.expired) return "expired-key";
    if (found.request_sha256 !== allocation.requestSha256) return { kind: "key-reused" };
    return { kind: "repeated", allocationId: found.allocation_id };
  });
}

interface KeyRow {
  tenant_id: string;
  key: string;
  request_sha256: string;
  allocation_id: string;
  expired: boolean;
}

async function findKeys(sql: Sql, repeated: readonly NewAllocation[]): Promise<Map<string, KeyRow>> {
  if (repeated.length === 0) return new Map();
  const input = JSON.stringify(
    repeated.map((allocation) => ({ tenant_id: allocation.tenantId, key: allocation.key })),
  );
  const rows = await sql<KeyRow[]>`
    select idempotency_keys.tenant_id, idempotency_keys.key, encode(request_sha256, 'hex') as request_sha256,
      allocation_id, created_at < now() - ${idempotencyHours} * interval '1 hour' as expired
    from idempotency_keys
    join jsonb_to_recordset(${input}::text::jsonb) as input(tenant_id uuid, key text)
      on input.tenant_id = idempotency_keys.tenant_id and input.key = idempotency_keys.key`;
  return new Map(rows.map((row) => [`${row.tenant_id} ${row.key}`, row]));
}

/** What was just written, without reading it back. */
export function presentNew(allocation: NewAllocation): Allocation {
  const at = new Date(allocation.createdAt).toISOString();
  return {
    id: allocation.id,
    tenant_id: allocation.tenantId,
    name: allocation.name,
    state: "queued",
    state_since: at,
    end_reason: null,
    message: queuedMessage,
    request: allocation.request,
    priority: allocation.priority,
    lease_seconds: allocation.leaseSeconds,
    expires_at: null,
    server_id: null,
    server_name: null,
    gpus: [],
    observed: {},
    created_at: at,
    scheduled_at: null,
    active_at: null,
    releasing_at: null,
    ended_at: null,
  };
}
