import type {
  Command,
  DesiredState,
  SessionResponse,
  Welcome,
} from "@palebluedot/shared/generated/palebluedot/agent/v1/agent.ts";
import { PlatformError } from "@palebluedot/shared/errors.ts";

const maxCommands = 64;

/** What a stream can do; a seam so that back-pressure is tested without a network. */
export interface OutgoingStream {
  /** False: wait for `drain`. */
  write(message: SessionResponse): boolean;
}

/**
 * The way down. Everything here is bounded whatever the agent does: of desired states and acks only the newest
 * waits, commands are refused beyond 64.
 */
export class Outgoing {
  readonly #stream: OutgoingStream;
  readonly #onDesiredWritten: (desired: DesiredState) => void;
  #writable = true;
  #welcomed = false;
  #closed = false;
  #sent: { readonly incarnation: string; readonly generation: number } | undefined;
  #desired: DesiredState | undefined;
  #ack: { readonly journalId: string; readonly lastSequence: number } | undefined;
  readonly #commands: Command[] = [];

  constructor(stream: OutgoingStream, onDesiredWritten: (desired: DesiredState) => void) {
    this.#stream = stream;
    this.#onDesiredWritten = onDesiredWritten;
  }

  welcome(welcome: Welcome): void {
    this.#write({ message: { $case: "welcome", value: welcome } });
    this.#welcomed = true;
    if (welcome.desiredState !== undefined) {
      this.#sent = welcome.desiredState;
      this.#onDesiredWritten(welcome.desiredState);
    }
    this.#flush();
  }

  desired(desired: DesiredState): void {
    const waiting = this.#desired;
    if (waiting !== undefined && !isNewer(desired, waiting)) return;
    this.#desired = desired;
    this.#flush();
  }

  ack(journalId: string, lastSequence: number): void {
    this.#ack = { journalId, lastSequence };
    this.#flush();
  }

  /** Throws PlatformError `agent-busy` when the agent does not keep up. */
  command(command: Command): void {
    if (this.#commands.length >= maxCommands) {
      throw new PlatformError({
        code: "agent-busy",
        kind: "unavailable",
        message: "the agent has not taken its last commands yet",
        hint: "Try again in a moment.",
      });
    }
    this.#commands.push(command);
    this.#flush();
  }

  drained(): void {
    this.#writable = true;
    this.#flush();
  }

  close(): void {
    this.#closed = true;
    this.#commands.length = 0;
    this.#desired = undefined;
  }

  #flush(): void {
    while (this.#writable && this.#welcomed && !this.#closed) {
      const desired = this.#desired;
      if (desired !== undefined) {
        this.#desired = undefined;
        if (this.#sent !== undefined && !isNewer(desired, this.#sent)) continue;
        this.#sent = { incarnation: desired.incarnation, generation: desired.generation };
        this.#write({ message: { $case: "desiredState", value: desired } });
        this.#onDesiredWritten(desired);
        continue;
      }
      const ack = this.#ack;
      if (ack !== undefined) {
        this.#ack = undefined;
        this.#write({ message: { $case: "eventAck", value: ack } });
        continue;
      }
      const command = this.#commands.shift();
      if (command === undefined) return;
      this.#write({ message: { $case: "command", value: command } });
    }
  }

  #write(message: SessionResponse): void {
    if (!this.#stream.write(message)) this.#writable = false;
  }
}

/** Another incarnation is always news: the controller's history changed. */
function isNewer(
  desired: { readonly incarnation: string; readonly generation: number },
  than: { readonly incarnation: string; readonly generation: number },
): boolean {
  return desired.incarnation !== than.incarnation || desired.generation > than.generation;
}
