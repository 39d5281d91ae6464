import { randomBytes } from "node:crypto";
import { PlatformError } from "@palebluedot/shared/errors.ts";
import type { EnrolRequest } from "@palebluedot/shared/generated/palebluedot/agent/v1/enrolment.ts";
import type { ServerPool } from "@palebluedot/shared/vocabulary.ts";
import type { TransactionSql } from "postgres";
import { uuidv7 } from "uuidv7";
import type { Dependencies } from "../dependencies.ts";
import { appendEvents } from "../events/outbox.ts";
import type { ServerStates } from "../servers/state-machine.ts";
import {
  issueAgentCertificate,
  readSigningRequest,
  type CertificateAuthority,
  type IssuedCertificate,
  type SigningRequest,
} from "./certificates.ts";
import {
  completeRecord,
  findCandidates,
  lockIdentity,
  parseIdentity,
  type Candidate,
  type CleanIdentity,
} from "./identity.ts";
import { hashJoinToken } from "./join-tokens.ts";

export type EnrolOutcome =
  | {
      readonly kind: "issued";
      readonly serverId: string;
      readonly certificate: IssuedCertificate;
      /** Certificates of other keys that this one replaced: their sessions must end. */
      readonly superseded: boolean;
    }
  | { readonly kind: "pending"; readonly serverId: string; readonly reason: string };

interface JoinToken {
  id: string;
  auto_approve: boolean;
  server_id: string | null;
  pool: ServerPool;
  labels: Record<string, string>;
}

interface RequestRow {
  server_id: string;
  join_token_id: string;
  state: "pending" | "approved" | "rejected";
  reason: string;
}

/** What the rules say about a new request. */
interface Verdict {
  readonly serverId: string;
  readonly approved: boolean;
  readonly reason: string;
}

export interface EnrolDependencies extends Dependencies {
  readonly states: ServerStates;
  readonly authority: CertificateAuthority;
}

/**
 * One enrolment, in one transaction: a refused attempt uses up nothing of the token, and a repeated one
 * (same key) finds what the first one decided. Throws PlatformError: csr-invalid, identity-invalid,
 * join-token-refused, key-revoked, enrolment-rejected.
 */
export async function enrol(deps: EnrolDependencies, request: EnrolRequest): Promise<EnrolOutcome> {
  const csr = await readSigningRequest(request.csrDer);
  const identity = readIdentity(request);
  return await deps.sql.begin(async (tx) => {
    await lockIdentity(tx, csr.publicKeySha256, identity);
    await refuseRevokedKey(tx, csr.publicKeySha256);
    const [existing] = await tx<RequestRow[]>`
      select server_id, join_token_id, state, reason from enrolment_requests
      where public_key_sha256 = ${csr.publicKeySha256} for update`;
    const token = await findToken(tx, request.joinToken);
    if (existing?.state === "rejected") {
      throw new PlatformError({
        code: "enrolment-rejected",
        kind: "forbidden",
        message: `an operator rejected this host${existing.reason === "" ? "" : `: ${existing.reason}`}`,
        hint: "Ask the operator; a new attempt needs a new key (remove the key from the agent's data directory).",
      });
    }
    const repeated = existing !== undefined && existing.join_token_id === token.id;
    const known = repeated || existing?.state === "approved";
    let verdict: Verdict;
    if (known) {
      // The answer to the first attempt was lost, or the approval came in the meantime.
      verdict = {
        serverId: existing.server_id,
        approved: existing.state === "approved",
        reason: existing.reason,
      };
    } else {
      verdict = await judge(tx, token, identity, existing);
      await tx`
        insert into enrolment_requests (public_key_sha256, server_id, join_token_id, identity, state, reason, decided_at)
        values (${csr.publicKeySha256}, ${verdict.serverId}, ${token.id}, ${tx.json(identity)},
          ${verdict.approved ? "approved" : "pending"}, ${verdict.reason}, ${verdict.approved ? new Date() : null})
        on conflict (public_key_sha256) do update set server_id = excluded.server_id,
          join_token_id = excluded.join_token_id, identity = excluded.identity, state = excluded.state,
          reason = excluded.reason, decided_at = excluded.decided_at`;
      await appendEvents(tx, [
        {
          type: verdict.approved ? "server.enrolled" : "server.enrolment-pending",
          severity: verdict.approved ? "info" : "warning",
          serverId: verdict.serverId,
          message: verdict.approved ? "a host enrolled" : `a host waits for approval: ${verdict.reason}`,
          data: {
            public_key_sha256: csr.publicKeySha256.toString("hex"),
            join_token_id: token.id,
            identity,
          },
        },
      ]);
    }
    let outcome: EnrolOutcome = { kind: "pending", serverId: verdict.serverId, reason: verdict.reason };
    if (verdict.approved) {
      await deps.states.transition(tx, {
        serverId: verdict.serverId,
        from: ["pending"],
        to: "verifying",
        message: "enrolled; waiting for the first inventory",
        actor: "system",
      });
      if (!repeated) await completeRecord(tx, verdict.serverId, identity);
      outcome = await issue(deps, tx, verdict.serverId, csr);
    }
    // Last: a fleet enrols with one token, and all of it would wait for this row's lock.
    if (!known) await useToken(tx, token.id);
    return outcome;
  });
}

/** Signs and records a certificate; certificates of other keys of this server are revoked. */
export async function issue(
  deps: EnrolDependencies,
  tx: TransactionSql,
  serverId: string,
  csr: SigningRequest,
): Promise<EnrolOutcome> {
  const [server] = await tx<{ state: string }[]>`select state from servers where id = ${serverId} for update`;
  if (server === undefined || server.state === "retired") {
    throw new PlatformError({
      code: "server-retired",
      kind: "forbidden",
      message: "this server's record was retired",
      hint: "The agent makes a new key by itself and enrols as a new server; it needs a join token. Keep its data directory: by it the agent knows its old containers.",
    });
  }
  const certificate = await issueAgentCertificate(
    deps.authority,
    { serverId, publicKeySpki: csr.publicKeySpki },
    deps.clock.now(),
    deps.config.PALEBLUEDOT_CERTIFICATE_HOURS * 3_600_000,
  );
  await tx`
    insert into certificates (serial, server_id, public_key_sha256, not_before, not_after)
    values (${certificate.serial}, ${serverId}, ${csr.publicKeySha256}, ${certificate.notBefore}, ${certificate.notAfter})`;
  const superseded = await tx`
    update certificates set revoked_at = now(), revoked_reason = 'superseded by another key'
    where server_id = ${serverId} and public_key_sha256 <> ${csr.publicKeySha256} and revoked_at is null`;
  return { kind: "issued", serverId, certificate, superseded: superseded.count > 0 };
}

/** A key that lost one certificate by revocation gets no other: revocation would mean nothing otherwise. */
export async function refuseRevokedKey(tx: TransactionSql, publicKeySha256: Buffer): Promise<void> {
  const [revoked] = await tx`
    select 1 from certificates where public_key_sha256 = ${publicKeySha256} and revoked_at is not null limit 1`;
  if (revoked === undefined) return;
  throw new PlatformError({
    code: "key-revoked",
    kind: "forbidden",
    message: "a certificate of this key was revoked",
    hint: "The host must enrol with a new key, and an operator must approve it.",
  });
}

function readIdentity(request: EnrolRequest): CleanIdentity {
  try {
    return parseIdentity(request.identity);
  } catch (cause) {
    throw new PlatformError({
      code: "identity-invalid",
      kind: "invalid",
      message:
        "the hardware identity is not acceptable: a field is too long, or there are too many addresses",
      cause,
    });
  }
}

async function findToken(tx: TransactionSql, token: string): Promise<JoinToken> {
  const [row] = await tx<(JoinToken & { revoked: boolean })[]>`
    select id, auto_approve, server_id, pool, labels, revoked_at is not null as revoked
    from join_tokens where token_sha256 = ${hashJoinToken(token)}`;
  if (row === undefined) throw tokenRefused("is not known");
  if (row.revoked) throw tokenRefused("was revoked");
  return row;
}

/** One statement counts and checks, so concurrent uses never exceed the limit. */
async function useToken(tx: TransactionSql, id: string): Promise<void> {
  const used = await tx`
    update join_tokens set uses = uses + 1
    where id = ${id} and revoked_at is null and expires_at > now() and uses < max_uses`;
  if (used.count === 1) return;
  const [row] = await tx<{ expired: boolean }[]>`
    select expires_at <= now() as expired from join_tokens where id = ${id}`;
  throw tokenRefused(row?.expired === true ? "has expired" : "was used up");
}

export function tokenRefused(why: string): PlatformError {
  return new PlatformError({
    code: "join-token-refused",
    kind: "unauthenticated",
    message: `the join token ${why}`,
    hint: "Make a new one: pbd join-token create",
  });
}

/** The identity rules. Creates a record where the host is new, or cannot be told apart. */
async function judge(
  tx: TransactionSql,
  token: JoinToken,
  identity: CleanIdentity,
  existing: RequestRow | undefined,
): Promise<Verdict> {
  const found = await findCandidates(tx, identity);
  // A request that waited comes back with another token: its own placeholder record is no rival.
  const candidates = found.filter((one) => one.id !== existing?.server_id || one.hadCertificate);

  if (token.server_id !== null) {
    const others = candidates.filter((one) => one.id !== token.server_id);
    if (others.length === 0) return { serverId: token.server_id, approved: true, reason: "" };
    // The use is rolled back: a bound token that reached the wrong host is still good for the right one.
    throw tokenRefused("is bound to another server than this hardware's");
  }
  const [only, ...others] = candidates;
  if (only === undefined) {
    const serverId = existing?.server_id ?? (await createServer(tx, token, identity, ""));
    return { serverId, approved: token.auto_approve, reason: token.auto_approve ? "" : "unknown hardware" };
  }
  if (others.length > 0) {
    const reason = `its identity matches several servers: ${names(candidates)}`;
    const serverId = existing?.server_id ?? (await createServer(tx, token, identity, reason));
    return { serverId, approved: false, reason };
  }
  if (only.hadCertificate) {
    return {
      serverId: only.id,
      approved: false,
      reason: `server ${only.name} holds a certificate of another key; approve to replace it, or use a join token bound to it`,
    };
  }
  // An operator wrote this record before the host came: that was the approval. A record that another
  // waiting host made says nothing about this one.
  const approved = token.auto_approve || !only.hasRequest;
  return { serverId: only.id, approved, reason: approved ? "" : "another host with this identity waits too" };
}

async function createServer(
  tx: TransactionSql,
  token: JoinToken,
  identity: CleanIdentity,
  reason: string,
): Promise<string> {
  const id = uuidv7();
  const base = serverName(identity.hostname);
  const ambiguous = reason !== "";
  for (const name of [base, `${base}-${randomBytes(4).toString("hex")}`]) {
    const inserted = await tx`
      insert into servers (id, name, state, state_message, pool, labels, serial, smbios_uuid, bmc_mac, bmc_address)
      values (${id}, ${name}, 'pending', ${reason === "" ? "waits for approval" : reason}, ${token.pool}, ${tx.json(token.labels)},
        ${ambiguous ? null : identity.serial}, ${ambiguous ? null : identity.smbios_uuid},
        ${ambiguous ? null : identity.bmc_mac}, ${identity.bmc_address})
      on conflict (name) do nothing`;
    if (inserted.count === 1) break;
  }
  if (!ambiguous) {
    await tx`
      insert into server_macs (mac, server_id)
      select mac, ${id} from unnest(${identity.mac_addresses}::text[]) as mac on conflict do nothing`;
  }
  return id;
}

function serverName(hostname: string): string {
  const name = hostname
    .toLowerCase()
    .replace(/[^a-z0-9.-]+/g, "-")
    .replace(/^[.-]+|[.-]+$/g, "")
    .slice(0, 63);
  return name === "" ? `server-${randomBytes(4).toString("hex")}` : name;
}

function names(candidates: readonly Candidate[]): string {
  return candidates.map((one) => one.name).join(", ");
}
