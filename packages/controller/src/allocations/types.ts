import type {
  DesiredState,
  ObservedState,
} from "@palebluedot/shared/generated/palebluedot/agent/v1/agent.ts";
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
   * that server are dropped and counted (an agent may lie).
   */
  observe(serverId: string, observed: ObservedState): Promise<void>;
  /** A server's GPUs, conditions, drain flag or approval changed: capacity must be reread. Never throws. */
  capacityChanged(serverIds: readonly string[]): void;
}

export type Tx = TransactionSql;
