import type { ServerPool } from "@palebluedot/shared/vocabulary.ts";

/** A join token without its secret, as REST shows it. */
export interface JoinTokenView {
  readonly id: string;
  readonly name: string;
  readonly autoApprove: boolean;
  /** Bound to this server: good for no other, single-use, and an approval in itself. */
  readonly serverId: string | null;
  readonly maxUses: number;
  readonly uses: number;
  readonly pool: ServerPool;
  readonly labels: Readonly<Record<string, string>>;
  readonly createdAt: Date;
  readonly createdBy: string | null;
  readonly expiresAt: Date;
  readonly revokedAt: Date | null;
}

export interface NewJoinToken {
  readonly name: string;
  readonly autoApprove?: boolean;
  readonly serverId?: string | null;
  /** 1..100000, default 1; must be 1 for a token bound to a server. */
  readonly maxUses?: number;
  /** Default one day, at most one year. */
  readonly expiresInSeconds?: number;
  readonly pool?: ServerPool;
  readonly labels?: Readonly<Record<string, string>>;
}

/** Who acts: "token:<token id>" or "system"; `id` goes into *_by columns when it is a UUID. */
export interface Actor {
  readonly name: string;
  readonly id?: string | null;
}

/** An agent that asked to be enrolled. */
export interface EnrolmentRequestView {
  /** Lower-case hex; names the request, and is what `palebluedot-agent` prints on its host. */
  readonly publicKeySha256: string;
  readonly serverId: string;
  readonly serverName: string;
  readonly joinTokenId: string;
  /** What the hardware said of itself (unverified). */
  readonly identity: Readonly<Record<string, unknown>>;
  readonly state: "pending" | "approved" | "rejected";
  readonly reason: string;
  readonly createdAt: Date;
  readonly decidedAt: Date | null;
}

/** Keyset page: `after` is the id of the last item seen (newest first). */
export interface PageRequest {
  readonly limit: number;
  readonly after?: string;
}

/** What REST and the command line need of enrolment. Every method throws PlatformError. */
export interface EnrolmentService {
  /** sha256 of the CA certificate (DER), lower-case hex without colons: what agents pin. */
  readonly caFingerprint: string;
  /** PEM of the CA certificate, for `curl --cacert` and the like. */
  readonly caCertificatePem: string;

  /** The secret (`pbj_...`) is returned here and never again. Codes: join-token-invalid, server-not-found. */
  createJoinToken(
    input: NewJoinToken,
    actor: Actor,
  ): Promise<{ readonly token: string; readonly joinToken: JoinTokenView }>;
  listJoinTokens(page: PageRequest): Promise<readonly JoinTokenView[]>;
  /** Idempotent. Code: join-token-not-found. */
  revokeJoinToken(id: string, actor: Actor): Promise<JoinTokenView>;

  listEnrolments(filter: {
    readonly state?: EnrolmentRequestView["state"];
    readonly serverId?: string;
    readonly limit: number;
  }): Promise<readonly EnrolmentRequestView[]>;
  /**
   * Approves the pending request of a server. With more than one pending the key must be named.
   * Codes: server-not-found, enrolment-not-pending, enrolment-ambiguous.
   */
  approveServer(
    serverId: string,
    actor: Actor,
    options?: { readonly publicKeySha256?: string },
  ): Promise<EnrolmentRequestView>;
  rejectEnrolment(
    serverId: string,
    actor: Actor,
    options?: { readonly publicKeySha256?: string; readonly reason?: string },
  ): Promise<EnrolmentRequestView>;
  /**
   * Revokes every live certificate of a server and ends its sessions at every replica at once. The keys
   * cannot renew nor enrol again; the host needs a new key and an approval. Returns how many.
   */
  revokeCertificates(serverId: string, reason: string, actor: Actor): Promise<number>;
  /** Ends the sessions of a server whose certificates were revoked in a transaction that is committed by now. */
  announceRevocation(serverId: string, message: string): Promise<void>;
  /** As above for one certificate, by its serial number (lower-case hex). Code: certificate-not-found. */
  revokeCertificate(serial: string, reason: string, actor: Actor): Promise<void>;
}
