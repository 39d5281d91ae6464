import type { EventJournal } from "../journal/types.ts";
import {
  Inventory,
  SessionRequest,
  type CommandResult,
  type GpuSample,
  type HostSample,
  type ObservedState,
} from "@palebluedot/shared/generated/palebluedot/agent/v1/agent.ts";

const eventsPerBatch = 100;
const maxCommandResults = 64;

/** The writing half of a stream; a seam for tests. */
export interface UpstreamStream {
  /** False: wait for `drain`. */
  write(message: SessionRequest): boolean;
}

/**
 * The way up. Outlives streams: it holds what must be said, bounded, and says it when there is a stream that takes
 * it. Of whole pictures (inventory, observed state) only the newest waits; events stay in the journal until
 * acknowledged; telemetry is dropped, oldest first.
 */
export class Upstream {
  readonly #journal: EventJournal;
  readonly #maxBatches: number;
  readonly #onUnsendable: (what: string, error: unknown) => void;
  #stream: UpstreamStream | undefined;
  #writable = false;
  #observed: ObservedState | undefined;
  #inventory: Inventory | undefined;
  #inventoryBytes: Buffer | undefined;
  #sentInventory: Buffer | undefined;
  #eventsSent = 0;
  #eventsAcked = 0;
  #results: CommandResult[] = [];
  #telemetry: { gpuSamples: readonly GpuSample[]; hostSamples: readonly HostSample[] }[] = [];
  droppedTelemetry = 0;

  constructor(
    journal: EventJournal,
    options: {
      readonly maxTelemetryBatches?: number;
      /** Told of a message that has no encoding (a fraction where the wire has an integer): it is dropped. */
      readonly onUnsendable?: (what: string, error: unknown) => void;
    } = {},
  ) {
    this.#journal = journal;
    this.#maxBatches = options.maxTelemetryBatches ?? 30;
    this.#onUnsendable = options.onUnsendable ?? (() => undefined);
    journal.onAppended(() => this.flush());
  }

  /** A stream that was welcomed. `lastEventSequence`: what the controller has of the journal. */
  attach(stream: UpstreamStream, lastEventSequence: number): void {
    this.#stream = stream;
    this.#writable = true;
    this.#sentInventory = undefined;
    this.#results = [];
    // What was sent and not acknowledged is sent again: the controller drops what it has.
    this.#eventsSent = lastEventSequence;
    this.#eventsAcked = lastEventSequence;
    this.flush();
  }

  detach(): void {
    this.#stream = undefined;
    this.#writable = false;
  }

  drained(): void {
    this.#writable = this.#stream !== undefined;
    this.flush();
  }

  observed(observed: ObservedState): void {
    this.#observed = observed;
    this.flush();
  }

  /** Sent when it differs from what this stream was told last. */
  inventory(inventory: Inventory): void {
    try {
      this.#inventoryBytes = Buffer.from(Inventory.encode(inventory).finish());
      this.#inventory = inventory;
    } catch (error) {
      // The last one that could be told stands.
      this.#onUnsendable("inventory", error);
    }
    this.flush();
  }

  telemetry(gpuSamples: readonly GpuSample[], hostSamples: readonly HostSample[]): void {
    this.#telemetry.push({ gpuSamples, hostSamples });
    if (this.#telemetry.length > this.#maxBatches) {
      this.#telemetry.shift();
      this.droppedTelemetry += 1;
    }
    this.flush();
  }

  result(result: CommandResult): void {
    if (this.#results.length >= maxCommandResults) this.#results.shift();
    this.#results.push(result);
    this.flush();
  }

  /** False: the acknowledgement is of another journal, whose sequences mean nothing in this one. */
  acked(journalId: string, sequence: number): boolean {
    if (journalId !== this.#journal.journalId) return false;
    this.#eventsAcked = Math.max(this.#eventsAcked, sequence);
    this.flush();
    return true;
  }

  flush(): void {
    while (this.#writable) {
      const message = this.#next();
      if (message === undefined) return;
      if (!this.#encodes(message)) continue;
      if (this.#stream?.write({ message }) !== true) this.#writable = false;
    }
  }

  /** The stream itself would answer a message without an encoding by ending the session, each time anew. */
  #encodes(message: NonNullable<SessionRequest["message"]>): boolean {
    try {
      SessionRequest.encode({ message });
      return true;
    } catch (error) {
      this.#onUnsendable(message.$case, error);
      return false;
    }
  }

  #next(): SessionRequest["message"] {
    const observed = this.#observed;
    if (observed !== undefined) {
      this.#observed = undefined;
      return { $case: "observedState", value: observed };
    }
    const result = this.#results.shift();
    if (result !== undefined) return { $case: "commandResult", value: result };
    const bytes = this.#inventoryBytes;
    if (this.#inventory !== undefined && bytes !== undefined && this.#sentInventory?.equals(bytes) !== true) {
      this.#sentInventory = bytes;
      return { $case: "inventory", value: this.#inventory };
    }
    // One batch at a time: the next goes when this one is acknowledged.
    if (this.#eventsAcked >= this.#eventsSent) {
      const events = this.#journal.pending(this.#eventsSent, eventsPerBatch);
      const last = events.at(-1);
      if (last !== undefined) {
        this.#eventsSent = last.sequence;
        return {
          $case: "durableEvents",
          value: { journalId: this.#journal.journalId, events: [...events] },
        };
      }
    }
    const telemetry = this.#telemetry.shift();
    if (telemetry === undefined) return undefined;
    return {
      $case: "telemetry",
      value: { gpuSamples: [...telemetry.gpuSamples], hostSamples: [...telemetry.hostSamples] },
    };
  }
}
