import type { Allocation, AllocationRequest } from "@palebluedot/shared/allocation-request.ts";
import type {
  DesiredState,
  ObservedState,
} from "@palebluedot/shared/generated/palebluedot/agent/v1/agent.ts";
import type { AllocationState } from "@palebluedot/shared/vocabulary.ts";
import type { TransactionSql } from "postgres";

/** What the agent link needs of allocations: the seam between the two features. */
export interface AllocationAgentPort {
  /**
   * The desired documents of these servers, in one query. A server without live allocations gets a
   * document without workloads. Secrets are decrypted here, at the last moment.
   */
  loadDesiredStates(serverIds: readonly string[]): Promise<Map<string, DesiredState>>;
  /**
   * Takes what an agent observed. Batches across servers, writes only what changed, appends events in
   * the same transaction. Resolves when it is committed. Reports about allocations that are not on
   * that server are dropped and counted (an agent may lie), and so is what a session says whose epoch
   * is no longer the server's: a newer session speaks for it.
   */
  observe(serverId: string, observed: ObservedState, sessionEpoch: number): Promise<void>;
  /** A server's GPUs, conditions, drain flag or approval changed: capacity must be reread. Never throws. */
  capacityChanged(serverIds: readonly string[]): void;
}

/** Who asks. Every query is filtered by the tenant; administrators and operators see all. */
export interface AllocationCaller {
  /** Undefined: bound to no tenant. */
  readonly tenantId: string | undefined;
  /** "token:<id>", for events */
  readonly actor: string;
  /** Id of the credential, for `created_by`. */
  readonly tokenId?: string | undefined;
}

export interface AllocationListQuery {
  /** 1..500 */
  readonly limit: number;
  /** Ids descend: the page after this id (the last one of the page before). */
  readonly afterId?: string | undefined;
  readonly states?: readonly AllocationState[] | undefined;
  readonly serverId?: string | undefined;
  /** For callers without a tenant. */
  readonly tenantId?: string | undefined;
  readonly name?: string | undefined;
}

/** What REST (and later gRPC) needs of allocations. All throw PlatformError. */
export interface AllocationService {
  /**
   * Durable when it resolves. With a key (1..255 visible characters) a repetition returns the same
   * allocation with `created: false`. Errors: `idempotency-key-reused` (other body), `tenant-not-found`,
   * `tenant-required`, `tenant-forbidden`.
   */
  create(
    caller: AllocationCaller,
    request: AllocationRequest,
    options?: { readonly idempotencyKey?: string | undefined },
  ): Promise<{ readonly allocation: Allocation; readonly created: boolean }>;
  /** Newest first. Full pages until the last: fewer than `limit` items means the end. */
  list(caller: AllocationCaller, query: AllocationListQuery): Promise<Allocation[]>;
  /** Error `allocation-not-found`, also for another tenant's. */
  get(caller: AllocationCaller, id: string): Promise<Allocation>;
  /**
   * The end of the output of a container that ended, at most 16 KiB; undefined when none was kept. Error as for
   * `get`.
   */
  outputTail(caller: AllocationCaller, id: string): Promise<Buffer | undefined>;
  /** Queued: ends as cancelled. With GPUs: releasing. Already releasing or ended: unchanged. */
  release(caller: AllocationCaller, id: string): Promise<Allocation>;
  /**
   * Ends all that is live on a server that is retired without it, in the caller's transaction, which holds the
   * server's row. Its claims are written off: the caller sees to it that these GPUs go to nobody. Returns what to
   * call when the transaction is committed.
   */
  abandonOn(
    tx: TransactionSql,
    serverId: string,
    why: { readonly reason: string; readonly actor: string },
  ): Promise<() => void>;
  /** Errors: `lease-too-long`, `allocation-not-live`. */
  extend(caller: AllocationCaller, id: string, extendSeconds: number): Promise<Allocation>;
}

export type Tx = TransactionSql;
