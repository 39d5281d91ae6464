import type { DurableEvent } from "@palebluedot/shared/generated/palebluedot/agent/v1/agent.ts";

/** What is handed to the journal: both GPU events and workload events have this shape. */
export interface JournalEntry {
  /** Dotted: "gpu.xid", "container.exited", "agent.started", ... */
  readonly type: string;
  readonly timeUnixMs: number;
  readonly message: string;
  readonly gpuUuid?: string;
  readonly allocationId?: string;
  /** Becomes data_json. Larger than 16 KiB as JSON it is replaced by `{"truncated":true}`. */
  readonly data?: Readonly<Record<string, unknown>>;
}

/**
 * Events that must not be lost, on disk until the controller acknowledged them. One writer per directory.
 * Bounded: when full the oldest events go, and one "journal.overflow" event with the sequence of the
 * last dropped one stands in their place (data: dropped_events, first_dropped_unix_ms,
 * last_dropped_unix_ms; cumulative until it is acknowledged).
 */
export interface EventJournal {
  /** Random, made with the journal's file. A new journal starts its sequence at 1 again. */
  readonly journalId: string;
  /**
   * Resolves with the event's sequence (1, 2, 3, ...) when it is on disk; concurrent calls share one fsync.
   * Rejects with PlatformError `journal-write-failed` when it could not be written (disk full): the
   * event is then not in the journal; a later append tries the disk anew. `journal-closed` after close.
   */
  append(entry: JournalEntry): Promise<number>;
  /** Forgets everything up to and including `sequence`. Calling it twice, or with an older one, is safe. */
  ackUpTo(sequence: number): Promise<void>;
  /** Durable and unacknowledged events after `afterSequence`, in order, at most `limit`. */
  pending(afterSequence: number, limit: number): readonly DurableEvent[];
  /** Sequence of the newest durable event, 0 when there never was one. */
  lastSequence(): number;
  /** Called after events became durable, once per written batch. Returns the unsubscribe function. */
  onAppended(listener: () => void): () => void;
  /** Writes what is queued, then closes the file. */
  close(): Promise<void>;
}
