import type {
  Condition,
  ContainerEngine,
  DesiredState,
  LogChunk,
  ObservedState,
  OpenLogs,
} from "@palebluedot/shared/generated/palebluedot/agent/v1/agent.ts";

/** Something durable to tell: "container.exited", "container.oom-killed", "workload.refused", ... */
export interface WorkloadEvent {
  readonly type: string;
  readonly allocationId: string;
  readonly message: string;
  readonly timeUnixMs: number;
  readonly data: Readonly<Record<string, unknown>>;
}

/** Converges this host's containers to the last desired state. The only writer of workload state. */
export interface Reconciler {
  /** Loads the last document from disk, adopts what runs, and goes on converging without a controller. */
  start(): Promise<void>;
  /** Ends the loop; containers keep running. */
  stop(): Promise<void>;
  /**
   * Journals the document on disk, then converges. Within one incarnation a lower generation for the same server
   * is ignored. Without a server's id it is taken for the same one's. Rejects with `desired-state-not-stored`
   * when the disk takes nothing: what is to be reclaimed then is reclaimed all the same, and nothing is started
   * until a later call could store it.
   */
  setDesired(desired: DesiredState, serverId?: string): Promise<void>;
  /** Incarnation and generation held on disk: "" and 0 when none. */
  held(): { readonly incarnation: string; readonly generation: number };
  observed(): ObservedState;
  onObserved(listener: (observed: ObservedState) => void): () => void;
  onEvent(listener: (event: WorkloadEvent) => void): () => void;
  engine(): ContainerEngine | undefined;
  conditions(): readonly Condition[];
  /** Container output; ends when the container ends (follow) or the log does. Throws PlatformError `workload-not-found`. */
  logs(request: OpenLogs, signal: AbortSignal): AsyncIterable<LogChunk>;
}
