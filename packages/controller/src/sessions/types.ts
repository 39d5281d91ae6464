import type { LogChunk, OpenLogs } from "@palebluedot/shared/generated/palebluedot/agent/v1/agent.ts";

/** The agent sessions that end at this replica. */
export interface SessionRegistry {
  /** Server ids with a live session here. */
  connected(): Iterable<string>;
  isConnected(serverId: string): boolean;
  /**
   * Says that the desired state of these servers changed. Loads the newest documents in one query and
   * pushes each over its stream; servers without a session here are skipped (they get it in Welcome).
   * Coalesces: several calls before the load ends cost one more load. Never throws.
   */
  desiredStateChanged(serverIds: readonly string[]): void;
  /** Ends the sessions of a server at once (revoked, retired, fenced by another replica). */
  disconnect(serverId: string, reason: "fenced" | "revoked", message: string): void;
  /** Opens a log stream of a workload. Ends when the agent ends it or the signal aborts. Throws PlatformError `agent-not-connected`. */
  openLogs(
    serverId: string,
    request: Omit<OpenLogs, "streamId">,
    signal: AbortSignal,
  ): AsyncIterable<LogChunk>;
}
