import type { ServerDuplexStream } from "@grpc/grpc-js";
import { errorMessage, isPlatformError } from "@palebluedot/shared/errors.ts";
import {
  Goodbye_Reason,
  type CommandResult,
  type DesiredState,
  type DurableEvents,
  type GpuSample,
  type Hello,
  type Inventory,
  type ObservedState,
  type SessionRequest,
  type SessionResponse,
  type TelemetryBatch,
} from "@palebluedot/shared/generated/palebluedot/agent/v1/agent.ts";
import type { AllocationAgentPort } from "../allocations/types.ts";
import type { Dependencies } from "../dependencies.ts";
import type { Gate } from "../enrolment/gate.ts";
import { cleanInventory, cleanStrings } from "../servers/clean-inventory.ts";
import { ingestEvents, maxEventsPerBatch } from "../servers/ingest-events.ts";
import { ingestInventory } from "../servers/ingest-inventory.ts";
import type { ServerStates } from "../servers/state-machine.ts";
import type { TelemetryStore } from "../telemetry/types.ts";
import { Outgoing } from "./outgoing.ts";
import { startSession, type StartedSession } from "./session-store.ts";
import { costOf } from "./wire-guard.ts";

/** An agent says Hello at once or is none. */
const helloTimeoutMs = 10_000;
/** Sustained; telemetry is one message per interval, so this is far above any honest agent. */
const maxMessagesPerSecond = 400;
/** Sustained, what messages cost as `costOf` says. A whole journal at its bound, sent at once, is less. */
const maxCostPerSecond = 16 * 1024 * 1024;
/** One sample per GPU and interval; an agent that could not send for a while sends one batch per interval. */
const maxSamplesPerBatch = 256;
const maxQueuedEventBatches = 4;
const maxWorkloads = 1024;
/** Agents' clocks within this are taken as they are. */
const toleratedSkewMs = 2000;

export interface SessionDependencies {
  readonly deps: Dependencies;
  readonly states: ServerStates;
  readonly allocations: AllocationAgentPort;
  readonly telemetry: TelemetryStore;
  /** Bounds what all sessions together do in the database at once. */
  readonly gate: Gate;
  loadDesired(serverId: string): Promise<DesiredState>;
  /** The session holds the server now: an older one here must end. */
  started(session: AgentSession, started: StartedSession): void;
  ended(session: AgentSession): void;
  commandResult(session: AgentSession, result: CommandResult): void;
  countTelemetry(samples: number, refused: number): void;
}

export interface Peer {
  readonly serverId: string;
  readonly certificateSerial: string;
  readonly certificateNotAfterMs: number;
  /** Of the socket; null when it has none that means anything elsewhere. */
  readonly remoteAddress: string | null;
}

/** One control stream. Its server is the one that the certificate names, whatever the messages say. */
export class AgentSession {
  readonly peer: Peer;
  epoch = 0;
  bootId = "";
  lastMessageMs: number;
  readonly outgoing: Outgoing;
  readonly #call: ServerDuplexStream<SessionRequest, SessionResponse>;
  readonly #with: SessionDependencies;
  readonly #helloTimer: NodeJS.Timeout;
  #closed = false;
  #greeted = false;
  #skewMs = 0;
  #gpus: ReadonlySet<string> = new Set();
  #inventorySha256: string | null = null;
  #second = 0;
  #messagesThisSecond = 0;
  #costThisSecond = 0;
  // What waits for the database: of whole pictures only the newest.
  #inventory: Inventory | undefined;
  #observed: ObservedState | undefined;
  readonly #events: DurableEvents[] = [];
  #working = false;
  #failures = 0;

  constructor(
    peer: Peer,
    call: ServerDuplexStream<SessionRequest, SessionResponse>,
    dependencies: SessionDependencies,
  ) {
    this.peer = peer;
    this.#call = call;
    this.#with = dependencies;
    this.lastMessageMs = dependencies.deps.clock.now();
    this.outgoing = new Outgoing(call, () => dependencies.deps.failpoints.hit("desired-state-pushed"));
    this.#helloTimer = setTimeout(
      () => this.end(Goodbye_Reason.PROTOCOL_ERROR, "no Hello in time"),
      helloTimeoutMs,
    );
    call.on("data", (message: SessionRequest) => this.#receive(message));
    call.on("drain", () => this.outgoing.drained());
    // A malformed message ends this stream with a status of its own; nothing else is touched.
    call.on("error", () => this.#close());
    call.on("cancelled", () => this.#close());
    call.on("close", () => this.#close());
    call.on("end", () => this.end(undefined, ""));
  }

  get serverId(): string {
    return this.peer.serverId;
  }

  /** Ends the stream; with a reason the agent is told why. */
  end(reason: Goodbye_Reason | undefined, message: string): void {
    if (this.#closed) return;
    if (reason !== undefined) this.#call.write({ message: { $case: "goodbye", value: { reason, message } } });
    this.#call.end();
    this.#close();
  }

  #close(): void {
    if (this.#closed) return;
    this.#closed = true;
    clearTimeout(this.#helloTimer);
    this.outgoing.close();
    this.#events.length = 0;
    this.#with.ended(this);
  }

  #receive(request: SessionRequest): void {
    if (this.#closed) return;
    const now = this.#with.deps.clock.now();
    this.lastMessageMs = now;
    const second = Math.floor(now / 1000);
    if (second !== this.#second) {
      this.#second = second;
      this.#messagesThisSecond = 0;
      this.#costThisSecond = 0;
    }
    this.#costThisSecond += costOf(request);
    if (this.#costThisSecond > maxCostPerSecond) {
      this.end(Goodbye_Reason.OVERLOADED, `more than ${maxCostPerSecond} bytes in a second`);
      return;
    }
    this.#messagesThisSecond += 1;
    if (this.#messagesThisSecond > maxMessagesPerSecond) {
      this.end(Goodbye_Reason.OVERLOADED, `more than ${maxMessagesPerSecond} messages in a second`);
      return;
    }
    const { message } = request;
    // A message of a later protocol version: ignored, as its sender expects.
    if (message === undefined) return;
    if (message.$case === "hello") {
      if (this.#greeted) this.end(Goodbye_Reason.PROTOCOL_ERROR, "a second Hello");
      else void this.#greet(message.value);
      this.#greeted = true;
      return;
    }
    if (!this.#greeted) {
      this.end(Goodbye_Reason.PROTOCOL_ERROR, "the first message must be Hello");
      return;
    }
    switch (message.$case) {
      case "telemetry":
        this.#sample(message.value);
        return;
      case "inventory":
        this.#inventory = message.value;
        break;
      case "observedState":
        this.#observed = message.value;
        break;
      case "durableEvents":
        this.#events.push(message.value);
        if (this.#events.length >= maxQueuedEventBatches) this.#call.pause();
        break;
      case "commandResult":
        this.#with.commandResult(this, message.value);
        return;
    }
    this.#work();
  }

  async #greet(hello: Hello): Promise<void> {
    clearTimeout(this.#helloTimer);
    const { deps, gate } = this.#with;
    try {
      const started = await gate.run(() =>
        startSession(deps.sql, {
          serverId: this.serverId,
          certificateSerial: this.peer.certificateSerial,
          remoteAddress: this.peer.remoteAddress,
          replicaId: deps.replicaId,
          hello,
        }),
      );
      if (started === undefined) {
        this.end(Goodbye_Reason.REVOKED, "the certificate is revoked, or the server is not known");
        return;
      }
      this.epoch = started.epoch;
      this.bootId = hello.bootId;
      this.#gpus = new Set(started.gpuUuids);
      // A server in verifying waits for its first inventory: an unchanged one counts too.
      this.#inventorySha256 = started.state === "verifying" ? null : started.inventorySha256;
      const skew = deps.clock.now() - hello.agentTimeUnixMs;
      this.#skewMs = Math.abs(skew) > toleratedSkewMs ? skew : 0;
      this.#with.started(this, started);
      if (this.#closed) {
        // It went while the database worked; its end was reported before it had an epoch.
        this.#with.ended(this);
        return;
      }
      const desiredState = await this.#with.loadDesired(this.serverId);
      if (this.#closed) return;
      this.outgoing.welcome({
        serverId: this.serverId,
        sessionEpoch: this.epoch,
        telemetryIntervalMs: deps.config.PALEBLUEDOT_TELEMETRY_INTERVAL_MS,
        lastEventSequence: started.lastEventSequence,
        desiredState,
        controllerTimeUnixMs: deps.clock.now(),
      });
      this.#work();
    } catch (error) {
      deps.log.warn({ server_id: this.serverId, err: errorMessage(error) }, "a session could not start");
      this.end(Goodbye_Reason.OVERLOADED, "the controller cannot take this session now");
    }
  }

  #sample(batch: TelemetryBatch): void {
    const { telemetry, deps } = this.#with;
    const samples = batch.gpuSamples;
    if (samples.length > maxSamplesPerBatch || batch.hostSamples.length > maxSamplesPerBatch) {
      this.end(Goodbye_Reason.PROTOCOL_ERROR, `more than ${maxSamplesPerBatch} samples in a batch`);
      return;
    }
    const latest = deps.clock.now() + toleratedSkewMs;
    let refused = 0;
    for (const sample of samples) {
      if (!this.#gpus.has(sample.gpuUuid)) refused += 1;
      if (this.#skewMs !== 0) sample.timeUnixMs += this.#skewMs;
      // A sample from the future would keep later ones out of the ring.
      if (sample.timeUnixMs > latest) sample.timeUnixMs = latest;
    }
    this.#with.countTelemetry(samples.length, refused);
    const own: readonly GpuSample[] =
      refused === 0 ? samples : samples.filter((sample) => this.#gpus.has(sample.gpuUuid));
    telemetry.append(this.serverId, own);
  }

  /** Takes what waits to the database, one thing at a time, most urgent first. */
  #work(): void {
    if (this.#working || this.#closed || this.epoch === 0) return;
    this.#working = true;
    void this.#drain();
  }

  async #drain(): Promise<void> {
    try {
      while (!this.#closed) {
        const task = this.#nextTask();
        if (task === undefined) return;
        await this.#attempt(task);
      }
    } finally {
      this.#working = false;
    }
  }

  #nextTask(): (() => Promise<void>) | undefined {
    const observed = this.#observed;
    if (observed !== undefined) {
      this.#observed = undefined;
      return async () => {
        try {
          await this.#observe(observed);
        } catch (error) {
          // Kept for the next attempt, unless a newer picture came meanwhile.
          this.#observed ??= observed;
          throw error;
        }
      };
    }
    const inventory = this.#inventory;
    if (inventory !== undefined) {
      this.#inventory = undefined;
      return async () => {
        try {
          await this.#take(inventory);
        } catch (error) {
          if (!isPlatformError(error)) this.#inventory ??= inventory;
          throw error;
        }
      };
    }
    const batch = this.#events[0];
    if (batch === undefined) return undefined;
    return async () => {
      await this.#record(batch);
      this.#events.shift();
      if (this.#events.length < maxQueuedEventBatches) this.#call.resume();
    };
  }

  async #attempt(task: () => Promise<void>): Promise<void> {
    const { deps } = this.#with;
    try {
      await task();
      this.#failures = 0;
    } catch (error) {
      if (isPlatformError(error) && error.kind === "invalid") {
        deps.log.warn(
          { server_id: this.serverId, code: error.code, reason: error.message },
          "agent sent nonsense",
        );
        this.end(Goodbye_Reason.PROTOCOL_ERROR, error.message);
        return;
      }
      this.#failures += 1;
      deps.log.error(
        { server_id: this.serverId, err: errorMessage(error) },
        "an agent's report was not stored",
      );
      // The agent has everything still: a new session sends it again.
      if (this.#failures >= 5) this.end(Goodbye_Reason.OVERLOADED, "the controller cannot store reports now");
      else await deps.clock.sleep(200 * 2 ** this.#failures);
    }
  }

  async #observe(observed: ObservedState): Promise<void> {
    if (observed.workloads.length > maxWorkloads) {
      this.end(Goodbye_Reason.PROTOCOL_ERROR, `more than ${maxWorkloads} workloads`);
      return;
    }
    await this.#with.allocations.observe(this.serverId, cleanStrings(observed) as ObservedState, this.epoch);
  }

  async #take(raw: Inventory): Promise<void> {
    const { deps, states, gate, allocations, telemetry } = this.#with;
    const inventory = cleanInventory(raw);
    if (inventory.sha256 === this.#inventorySha256) return;
    const result = await gate.run(() =>
      ingestInventory(
        { sql: deps.sql, log: deps.log, states },
        { serverId: this.serverId, epoch: this.epoch },
        inventory,
      ),
    );
    if (result === undefined) {
      this.end(Goodbye_Reason.FENCED, "a newer session took over");
      return;
    }
    this.#inventorySha256 = inventory.sha256;
    this.#gpus = new Set(result.gpuUuids);
    for (const uuid of result.goneUuids) telemetry.forget(uuid);
    allocations.capacityChanged([this.serverId]);
    await deps.notifications.notify("fleet", this.serverId);
  }

  async #record(batch: DurableEvents): Promise<void> {
    const { deps, gate } = this.#with;
    if (!/^[0-9a-zA-Z-]{1,64}$/.test(batch.journalId) || batch.events.length > maxEventsPerBatch) {
      this.end(
        Goodbye_Reason.PROTOCOL_ERROR,
        "a batch of events has no valid journal id, or too many events",
      );
      return;
    }
    const last = await gate.run(() =>
      ingestEvents(deps.sql, { serverId: this.serverId, epoch: this.epoch }, batch.journalId, batch.events),
    );
    if (last === undefined) {
      this.end(Goodbye_Reason.FENCED, "a newer session took over");
      return;
    }
    this.outgoing.ack(batch.journalId, last);
  }
}
