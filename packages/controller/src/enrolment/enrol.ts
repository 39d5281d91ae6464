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

/** Who let a host in. The last two name the host, and are an operator's word. */
type Approval = "auto-approve" | "recorded-server" | "bound-token" | "operator";

interface RequestRow {
  server_id: string;
  join_token_id: string;
  state: "pending" | "approved" | "rejected";
  reason: string;
  approval: Approval | null;
  decided_at: Date | null;
  made_server: boolean;
}

/** What the rules say about a new request. */
interface Verdict {
  readonly serverId: string;
  /** Null: it waits, for the reason. */
  readonly approval: Approval | null;
  readonly reason: string;
  /** The record is this request's own placeholder. */
  readonly madeServer: boolean;
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
      select server_id, join_token_id, state, reason, approval, decided_at, made_server from enrolment_requests
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
    // The answer to the first attempt was lost, or the approval came in the meantime.
    const judged: Verdict = known
      ? {
          serverId: existing.server_id,
          approval: existing.approval,
          reason: existing.reason,
          madeServer: existing.made_server,
        }
      : await judge(tx, token, identity, csr.publicKeySha256, existing);
    const passed = known ? existing.state === "approved" : judged.approval !== null;
    const rival = passed
      ? await findRival(tx, judged, csr.publicKeySha256, known ? existing.decided_at : null)
      : undefined;
    const approved = passed && rival === undefined;
    const verdict: Verdict = rival === undefined ? judged : { ...judged, approval: null, reason: rival };
    if (!known || rival !== undefined) {
      await tx`
        insert into enrolment_requests
          (public_key_sha256, server_id, join_token_id, identity, state, reason, approval, made_server, decided_at)
        values (${csr.publicKeySha256}, ${verdict.serverId}, ${token.id}, ${tx.json(identity)},
          ${approved ? "approved" : "pending"}, ${verdict.reason}, ${verdict.approval}, ${verdict.madeServer},
          case when ${approved} then now() end)
        on conflict (public_key_sha256) do update set server_id = excluded.server_id,
          join_token_id = excluded.join_token_id, identity = excluded.identity, state = excluded.state,
          reason = excluded.reason, approval = excluded.approval, made_server = excluded.made_server,
          decided_at = excluded.decided_at`;
      await appendEvents(tx, [
        {
          type: approved ? "server.enrolled" : "server.enrolment-pending",
          severity: approved ? "info" : "warning",
          serverId: verdict.serverId,
          message: approved ? "a host enrolled" : `a host waits for approval: ${verdict.reason}`,
          data: {
            public_key_sha256: csr.publicKeySha256.toString("hex"),
            join_token_id: token.id,
            approval: verdict.approval,
            identity,
          },
        },
      ]);
    }
    let outcome: EnrolOutcome = { kind: "pending", serverId: verdict.serverId, reason: verdict.reason };
    if (approved) {
      await deps.states.transition(tx, {
        serverId: verdict.serverId,
        from: ["pending"],
        to: "verifying",
        message: "enrolled; waiting for the first inventory",
        actor: "system",
      });
      if (!repeated) await completeRecord(tx, verdict.serverId, identity);
      outcome = await issue(deps, tx, verdict.serverId, csr, { replacing: replaces(verdict.approval) });
    }
    // Last: a fleet enrols with one token, and all of it would wait for this row's lock.
    if (!known) await useToken(tx, token.id);
    return outcome;
  });
}

const replaces = (approval: Approval | null): boolean =>
  approval === "bound-token" || approval === "operator";

/**
 * Why this approval is not enough for its server, if so: another key holds the server, and nobody who may say so
 * said that this host replaces it. An approval from before the other key came says nothing about it either.
 */
async function findRival(
  tx: TransactionSql,
  verdict: Verdict,
  publicKeySha256: Buffer,
  decidedAt: Date | null,
): Promise<string | undefined> {
  const [server] = await tx<
    { name: string }[]
  >`select name from servers where id = ${verdict.serverId} for update`;
  const [rival] = await tx`
    select 1 from certificates live
    where live.server_id = ${verdict.serverId} and live.public_key_sha256 <> ${publicKeySha256} and live.revoked_at is null
      and (not ${replaces(verdict.approval)} or ${decidedAt}::timestamptz < (
        select min(issued_at) from certificates first
        where first.server_id = live.server_id and first.public_key_sha256 = live.public_key_sha256))
    limit 1`;
  return rival === undefined ? undefined : heldByAnother(server?.name ?? verdict.serverId);
}

const heldByAnother = (name: string): string =>
  `server ${name} holds a certificate of another key; approve to replace it, or use a join token bound to it`;

/**
 * Signs and records a certificate. When it replaces, certificates of other keys of this server are revoked;
 * otherwise there must be none: throws PlatformError `server-held-by-another-key`.
 */
export async function issue(
  deps: EnrolDependencies,
  tx: TransactionSql,
  serverId: string,
  csr: SigningRequest,
  options: { readonly replacing: boolean },
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
  if (superseded.count > 0 && !options.replacing) {
    throw new PlatformError({
      code: "server-held-by-another-key",
      kind: "conflict",
      message: "another key holds a certificate of this server",
      hint: "An operator must approve the replacement, or revoke one of the two.",
    });
  }
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
  publicKeySha256: Buffer,
  existing: RequestRow | undefined,
): Promise<Verdict> {
  const found = await findCandidates(tx, identity);
  // A request that waited comes back with another token: its own placeholder record is no rival.
  const placeholder = await ownPlaceholder(tx, publicKeySha256, existing);
  const candidates = found.filter((one) => one.id !== placeholder);
  const verdict = (serverId: string, approval: Approval | null, reason: string): Verdict => ({
    serverId,
    approval,
    reason,
    madeServer: serverId === placeholder,
  });
  const ownRecord = async (approval: Approval | null, reason: string, note: string): Promise<Verdict> => ({
    ...verdict(placeholder ?? (await createServer(tx, token, identity, note)), approval, reason),
    madeServer: true,
  });

  if (token.server_id !== null) {
    const others = candidates.filter((one) => one.id !== token.server_id);
    if (others.length === 0) return verdict(token.server_id, "bound-token", "");
    // The use is rolled back: a bound token that reached the wrong host is still good for the right one.
    throw tokenRefused("is bound to another server than this hardware's");
  }
  const [only, ...others] = candidates;
  if (only === undefined) {
    return await ownRecord(
      token.auto_approve ? "auto-approve" : null,
      token.auto_approve ? "" : "unknown hardware",
      "",
    );
  }
  if (others.length > 0) {
    const reason = `its identity matches several servers: ${names(candidates)}`;
    return await ownRecord(null, reason, reason);
  }
  if (only.hadCertificate) return verdict(only.id, null, heldByAnother(only.name));
  // An operator wrote this record before the host came: that was the approval. A record that another
  // waiting host made says nothing about this one.
  if (!only.hasRequest) return verdict(only.id, "recorded-server", "");
  return token.auto_approve
    ? verdict(only.id, "auto-approve", "")
    : verdict(only.id, null, "another host with this identity waits too");
}

/**
 * The record that this very request made and that is nobody else's yet. Any other record that it waited on,
 * it waited on for a reason: that another token lets unknown hosts in does not make it this host's.
 */
async function ownPlaceholder(
  tx: TransactionSql,
  publicKeySha256: Buffer,
  existing: RequestRow | undefined,
): Promise<string | undefined> {
  if (existing?.made_server !== true) return undefined;
  const [row] = await tx<{ id: string }[]>`
    select id from servers s
    where id = ${existing.server_id} and state = 'pending'
      and not exists (select 1 from certificates c where c.server_id = s.id)
      and not exists (
        select 1 from enrolment_requests r where r.server_id = s.id and r.public_key_sha256 <> ${publicKeySha256})
    for update`;
  return row?.id;
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
