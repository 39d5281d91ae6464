import { X509Certificate } from "node:crypto";
import { serverUriPrefix } from "@palebluedot/shared/agent-link.ts";
import { PlatformError } from "@palebluedot/shared/errors.ts";
import type {
  EnrolRequest,
  RenewRequest,
} from "@palebluedot/shared/generated/palebluedot/agent/v1/enrolment.ts";
import type { ISql, TransactionSql } from "postgres";
import type { Dependencies } from "../dependencies.ts";
import { appendEvents } from "../events/outbox.ts";
import { createServerStates } from "../servers/state-machine.ts";
import { ensureAuthorities } from "./authority.ts";
import { readSigningRequest, type CertificateAuthority, type IssuedCertificate } from "./certificates.ts";
import { enrol, issue, refuseRevokedKey, type EnrolDependencies, type EnrolOutcome } from "./enrol.ts";
import { createJoinToken, listJoinTokens, revokeJoinToken, serverNotFound } from "./join-tokens.ts";
import { revocationEvent, revokeAllCertificates } from "./revocation.ts";
import type { Actor, EnrolmentRequestView, EnrolmentService } from "./types.ts";

/** What the listeners need beyond what REST sees. */
export interface EnrolmentInternals extends EnrolmentService {
  readonly authorities: readonly [CertificateAuthority, ...CertificateAuthority[]];
  enrol(request: EnrolRequest): Promise<EnrolOutcome>;
  /** Throws PlatformError: certificate-unknown, certificate-revoked, key-revoked, csr-invalid, server-retired. */
  renew(request: RenewRequest): Promise<IssuedCertificate>;
}

export interface EnrolmentHooks {
  /** Ends the sessions of a server at this replica; others are told through the database. */
  disconnect(serverId: string, reason: "revoked", message: string): void;
}

export async function createEnrolmentService(
  dependencies: Dependencies,
  hooks: EnrolmentHooks,
): Promise<EnrolmentInternals> {
  const authorities = await ensureAuthorities(dependencies);
  const deps: EnrolDependencies = {
    ...dependencies,
    states: createServerStates(dependencies),
    authority: authorities[0],
  };
  const { sql } = deps;

  async function announceRevocation(serverId: string, message: string): Promise<void> {
    hooks.disconnect(serverId, "revoked", message);
    await deps.notifications.notify("certificates", serverId);
  }

  return {
    authorities,
    caFingerprint: authorities[0].fingerprint,
    caCertificatePem: authorities[0].certificatePem,

    async enrol(request) {
      const outcome = await enrol(deps, request);
      if (outcome.kind === "issued" && outcome.superseded) {
        await announceRevocation(outcome.serverId, "another key was approved for this server");
      }
      return outcome;
    },
    renew: (request) => renew(deps, authorities, request),

    createJoinToken: (input, actor) => createJoinToken(sql, input, actor),
    listJoinTokens: (page) => listJoinTokens(sql, page),
    revokeJoinToken: (id, actor) => revokeJoinToken(sql, id, actor),

    listEnrolments: (filter) =>
      selectRequests(
        sql,
        sql`${filter.state === undefined ? sql`true` : sql`r.state = ${filter.state}`}
          and ${filter.serverId === undefined ? sql`true` : sql`r.server_id = ${filter.serverId}`}`,
        filter.limit,
      ),

    approveServer: (serverId, actor, options) =>
      sql.begin(async (tx) => {
        const request = await onePending(tx, serverId, options?.publicKeySha256);
        await decide(tx, request, "approved", "", actor);
        await deps.states.transition(tx, {
          serverId,
          from: ["pending"],
          to: "verifying",
          message: "approved; waiting for the agent",
          actor: actor.name,
        });
        return { ...request, state: "approved", reason: "" };
      }),

    rejectEnrolment: (serverId, actor, options) =>
      sql.begin(async (tx) => {
        const request = await onePending(tx, serverId, options?.publicKeySha256);
        const reason = (options?.reason ?? "").slice(0, 512);
        await decide(tx, request, "rejected", reason, actor);
        return { ...request, state: "rejected", reason };
      }),

    announceRevocation,

    async revokeCertificates(serverId, reason, actor) {
      const count = await sql.begin(async (tx) => {
        const [server] = await tx`select 1 from servers where id = ${serverId} for update`;
        if (server === undefined) throw serverNotFound(serverId);
        return await revokeAllCertificates(tx, serverId, reason, actor);
      });
      await announceRevocation(serverId, reason);
      return count;
    },

    async revokeCertificate(serial, reason, actor) {
      const serverId = await sql.begin(async (tx) => {
        const [row] = await tx<{ server_id: string; was_live: boolean }[]>`
          with old as (select serial, revoked_at from certificates where serial = ${serial} for update)
          update certificates c set revoked_at = coalesce(c.revoked_at, now()),
            revoked_reason = coalesce(c.revoked_reason, ${reason})
          from old where c.serial = old.serial returning c.server_id, old.revoked_at is null as was_live`;
        if (row === undefined) {
          throw new PlatformError({
            code: "certificate-not-found",
            kind: "not-found",
            message: "there is no certificate with this serial number",
          });
        }
        if (row.was_live) await revocationEvent(tx, row.server_id, [serial], reason, actor);
        return row.server_id;
      });
      // The other replicas, and this one, look up which of the server's certificates are revoked.
      await announceRevocation(serverId, reason);
    },
  };
}

async function renew(
  deps: EnrolDependencies,
  authorities: readonly CertificateAuthority[],
  request: RenewRequest,
): Promise<IssuedCertificate> {
  const csr = await readSigningRequest(request.csrDer);
  const { serverId, serial } = readOwnCertificate(authorities, request.certificateDer, csr.publicKeySpki);
  return await deps.sql.begin(async (tx) => {
    const [row] = await tx<{ revoked: boolean; reason: string | null }[]>`
      select revoked_at is not null as revoked, revoked_reason as reason from certificates
      where serial = ${serial} and server_id = ${serverId} and public_key_sha256 = ${csr.publicKeySha256} for update`;
    if (row === undefined) throw certificateUnknown();
    if (row.revoked) {
      throw new PlatformError({
        code: "certificate-revoked",
        kind: "forbidden",
        message: `this certificate was revoked: ${row.reason ?? "no reason given"}`,
        hint: "The host must enrol with a new key, and an operator must approve it.",
      });
    }
    await refuseRevokedKey(tx, csr.publicKeySha256);
    const outcome = await issue(deps, tx, serverId, csr, { replacing: false });
    if (outcome.kind !== "issued") throw new Error("issue did not issue");
    return outcome.certificate;
  });
}

/** Expired ones are welcome: a host that was off for weeks still holds its key. */
function readOwnCertificate(
  authorities: readonly CertificateAuthority[],
  der: Uint8Array,
  publicKeySpki: Buffer,
): { serverId: string; serial: string } {
  try {
    const certificate = new X509Certificate(der);
    const signed = authorities.some((authority) => {
      const issuer = new X509Certificate(authority.certificateDer);
      return certificate.checkIssued(issuer) && certificate.verify(issuer.publicKey);
    });
    const key = certificate.publicKey.export({ type: "spki", format: "der" });
    const serverId = serverIdOf(certificate.subjectAltName);
    if (!signed || serverId === undefined || !key.equals(publicKeySpki)) throw new Error("not ours");
    return { serverId, serial: certificate.serialNumber.toLowerCase() };
  } catch (cause) {
    throw certificateUnknown(cause);
  }
}

/** The server id in a subject alternative name as Node prints it: "URI:palebluedot://server/<uuid>". */
export function serverIdOf(subjectAltName: string | undefined): string | undefined {
  const prefix = `URI:${serverUriPrefix}`;
  for (const name of (subjectAltName ?? "").split(", ")) {
    const id = name.startsWith(prefix) ? name.slice(prefix.length) : "";
    if (/^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$/.test(id)) return id;
  }
  return undefined;
}

function certificateUnknown(cause?: unknown): PlatformError {
  return new PlatformError({
    code: "certificate-unknown",
    kind: "unauthenticated",
    message: "this is no certificate of this installation for the key that signed the request",
    hint: "Enrol again with a join token.",
    cause,
  });
}

async function selectRequests(
  sql: ISql,
  where: ReturnType<ISql>,
  limit: number,
): Promise<readonly EnrolmentRequestView[]> {
  return await sql<EnrolmentRequestView[]>`
    select encode(r.public_key_sha256, 'hex') as "publicKeySha256", r.server_id as "serverId", s.name as "serverName",
      r.join_token_id as "joinTokenId", r.identity, r.state, r.reason, r.created_at as "createdAt",
      r.decided_at as "decidedAt"
    from enrolment_requests r join servers s on s.id = r.server_id
    where ${where} order by r.created_at desc, r.public_key_sha256 limit ${limit}`;
}

async function onePending(
  tx: TransactionSql,
  serverId: string,
  publicKeySha256: string | undefined,
): Promise<EnrolmentRequestView> {
  const [server] = await tx`select 1 from servers where id = ${serverId} for update`;
  if (server === undefined) throw serverNotFound(serverId);
  const key =
    publicKeySha256 === undefined ? tx`true` : tx`encode(r.public_key_sha256, 'hex') = ${publicKeySha256}`;
  const pending = await selectRequests(
    tx,
    tx`r.server_id = ${serverId} and r.state = 'pending' and ${key}`,
    20,
  );
  const [only, ...others] = pending;
  if (only === undefined) {
    throw new PlatformError({
      code: "enrolment-not-pending",
      kind: "conflict",
      message: "no host waits for approval as this server",
      hint: "Approval follows the agent's first contact; see the server's enrolments.",
    });
  }
  if (others.length > 0) {
    throw new PlatformError({
      code: "enrolment-ambiguous",
      kind: "conflict",
      message: `${pending.length} hosts wait for approval as this server`,
      hint: "Name the key: the agent prints its public key's SHA-256 on its host.",
      details: { public_key_sha256: pending.map((request) => request.publicKeySha256) },
    });
  }
  return only;
}

async function decide(
  tx: TransactionSql,
  request: EnrolmentRequestView,
  state: "approved" | "rejected",
  reason: string,
  actor: Actor,
): Promise<void> {
  await tx`
    update enrolment_requests set state = ${state}, reason = ${reason},
      approval = ${state === "approved" ? "operator" : null}, decided_at = now(), decided_by = ${actor.id ?? null}
    where public_key_sha256 = decode(${request.publicKeySha256}, 'hex')`;
  await appendEvents(tx, [
    {
      type: `server.enrolment-${state}`,
      serverId: request.serverId,
      actor: actor.name,
      message: `enrolment ${state}${reason === "" ? "" : `: ${reason}`}`,
      data: { public_key_sha256: request.publicKeySha256 },
    },
  ]);
}
