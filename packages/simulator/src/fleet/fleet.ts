import { generateKeyPair, randomUUID, type KeyObject } from "node:crypto";
import { promisify } from "node:util";
import { ChannelCredentials, Metadata, type ClientDuplexStream } from "@grpc/grpc-js";
import { controllerTlsName } from "@palebluedot/shared/agent-link.ts";
import { fullJitterMs } from "@palebluedot/shared/backoff.ts";
import { errorMessage } from "@palebluedot/shared/errors.ts";
import {
  EnrolmentServiceClient,
  EnrolState,
  type EnrolResponse,
} from "@palebluedot/shared/generated/palebluedot/agent/v1/enrolment.ts";
import {
  AgentServiceClient,
  WorkloadDesired_Target,
  WorkloadObserved_Phase,
  type DesiredState,
  type SessionRequest,
  type SessionResponse,
  type WorkloadObserved,
} from "@palebluedot/shared/generated/palebluedot/agent/v1/agent.ts";
import { fromGrpcError } from "@palebluedot/shared/grpc-status.ts";
import {
  certificatePem,
  fetchPinnedAuthority,
  normaliseFingerprint,
  splitHostPort,
} from "@palebluedot/shared/pinned-authority.ts";
import { createSigningRequest } from "@palebluedot/shared/pkcs10.ts";
import { simulatedInventory, simulatedSamples, type SimulatedHost } from "./host.ts";

const generateKey = promisify(generateKeyPair);

export interface FleetOptions {
  /** host:port of the enrolment listener. */
  readonly controller: string;
  readonly caFingerprint: string;
  /** Auto-approving, with at least `agents` uses. */
  readonly joinToken: string;
  readonly agents: number;
  readonly gpusPerServer: number;
  readonly telemetryIntervalMs: number;
  /** Sets this fleet's hosts and GPUs apart from another's. Default 1. */
  readonly seed?: number;
  readonly model?: string;
  /** Enrolments and handshakes under way at once; default 32. */
  readonly concurrency?: number;
  /** A workload appeared in a desired state for the first time, at `t` (performance.timeOrigin + performance.now(), ms). */
  readonly onStartCommand?: (allocationId: string, t: number) => void;
  readonly onError?: (message: string) => void;
}

export interface Fleet {
  readonly agents: number;
  connected(): number;
  statistics(): {
    readonly connected: number;
    readonly telemetryMessages: number;
    readonly desiredStates: number;
    readonly reconnects: number;
    readonly errors: number;
  };
  /** Resolves when every agent was welcomed at least once; rejects when the signal aborts. */
  ready(signal?: AbortSignal): Promise<void>;
  stop(): Promise<void>;
}

/** Many agent sessions in one process, over real mutual TLS; containers run and end at once. */
export async function startFleet(options: FleetOptions): Promise<Fleet> {
  const seed = options.seed ?? 1;
  const model = options.model ?? "NVIDIA H100 80GB HBM3";
  const address = splitHostPort(options.controller, 8443);
  const target = `${address.host.includes(":") ? `[${address.host}]` : address.host}:${address.port}`;
  const authority = Buffer.from(
    certificatePem(
      await fetchPinnedAuthority({ ...address, fingerprint: normaliseFingerprint(options.caFingerprint) }),
    ),
  );
  // One connection enrols them all: the handshakes that count are those of the sessions.
  const enrolment = new EnrolmentServiceClient(target, ChannelCredentials.createSsl(authority), {
    "grpc.ssl_target_name_override": controllerTlsName,
  });
  const stop = new AbortController();
  const counters = { telemetryMessages: 0, desiredStates: 0, reconnects: 0, errors: 0 };
  const gate = createGate(options.concurrency ?? 32);
  let connected = 0;
  let welcomed = 0;
  const all = Promise.withResolvers<void>();

  const runs = Array.from({ length: options.agents }, async (_unused, index) => {
    const host: SimulatedHost = { seed, index, gpus: options.gpusPerServer, model };
    const agent = new FleetAgent(host, {
      authority,
      host: address.host,
      telemetryIntervalMs: options.telemetryIntervalMs,
      signal: stop.signal,
      connectedBy: (delta) => {
        connected += delta;
      },
      welcomed: () => {
        welcomed += 1;
        if (welcomed === options.agents) all.resolve();
      },
      counters,
      ...(options.onStartCommand === undefined ? {} : { onStartCommand: options.onStartCommand }),
      ...(options.onError === undefined ? {} : { onError: options.onError }),
    });
    await agent.run(enrolment, options.joinToken, gate);
  });

  return {
    agents: options.agents,
    connected: () => connected,
    statistics: () => ({ connected, ...counters }),
    async ready(signal) {
      if (signal === undefined) {
        await all.promise;
        return;
      }
      await Promise.race([
        all.promise,
        new Promise((_resolve, reject) => {
          signal.addEventListener("abort", () => reject(signal.reason as Error), { once: true });
        }),
      ]);
    },
    async stop() {
      stop.abort(new Error("the fleet stops"));
      await Promise.all(runs);
      enrolment.close();
    },
  };
}

interface AgentContext {
  readonly authority: Buffer;
  /** Where the controller was reached. */
  readonly host: string;
  readonly telemetryIntervalMs: number;
  readonly signal: AbortSignal;
  readonly counters: {
    telemetryMessages: number;
    desiredStates: number;
    reconnects: number;
    errors: number;
  };
  connectedBy(delta: 1 | -1): void;
  welcomed(): void;
  readonly onStartCommand?: (allocationId: string, t: number) => void;
  readonly onError?: (message: string) => void;
}

type Gate = <T>(work: () => Promise<T>) => Promise<T>;

class FleetAgent {
  readonly #host: SimulatedHost;
  readonly #context: AgentContext;
  readonly #journalId = randomUUID();
  readonly #bootId = randomUUID();
  readonly #started = new Set<string>();
  #key: KeyObject | undefined;
  #wasWelcomed = false;
  #incarnation = "";
  #generation = 0;
  #workloads: readonly WorkloadObserved[] = [];

  constructor(host: SimulatedHost, context: AgentContext) {
    this.#host = host;
    this.#context = context;
  }

  /** Enrols, then keeps a session until the signal aborts. */
  async run(enrolment: EnrolmentServiceClient, joinToken: string, gate: Gate): Promise<void> {
    const { signal, counters, onError } = this.#context;
    let issued: EnrolResponse | undefined;
    for (let attempt = 0; !signal.aborted; attempt += 1) {
      try {
        issued ??= await gate(() => this.#enrol(enrolment, joinToken));
        const response = issued;
        const lived = await this.#session(response, gate);
        if (lived) attempt = 0;
        counters.reconnects += 1;
      } catch (error) {
        counters.errors += 1;
        onError?.(errorMessage(error));
      }
      await sleep(fullJitterMs(attempt, { baseMs: 1000, capMs: 20_000 }), signal);
    }
  }

  async #enrol(client: EnrolmentServiceClient, joinToken: string): Promise<EnrolResponse> {
    this.#key ??= (await generateKey("ec", { namedCurve: "P-256" })).privateKey;
    const key = this.#key;
    const inventory = simulatedInventory(this.#host);
    const response = await new Promise<EnrolResponse>((resolve, reject) => {
      client.enrol(
        {
          joinToken,
          csrDer: createSigningRequest(key),
          agentVersion: "fleet",
          identity: {
            smbiosUuid: inventory.host?.smbiosUuid ?? "",
            serial: inventory.host?.serial ?? "",
            manufacturer: inventory.host?.manufacturer ?? "",
            product: inventory.host?.product ?? "",
            macAddresses: (inventory.host?.networkInterfaces ?? []).map((nic) => nic.mac),
            bmcMac: "",
            bmcAddress: "",
            hostname: inventory.host?.hostname ?? "",
          },
        },
        new Metadata(),
        { deadline: Date.now() + 120_000 },
        (error, value) => {
          if (error === null) resolve(value);
          else reject(fromGrpcError(error));
        },
      );
    });
    if (response.state !== EnrolState.ISSUED) throw new Error(`not approved: ${response.message}`);
    return response;
  }

  /** One session. True when it was welcomed. The gate bounds handshakes, not sessions. */
  async #session(issued: EnrolResponse, gate: Gate): Promise<boolean> {
    const told = splitHostPort(issued.agentEndpoint, 8444);
    const host = told.host === controllerTlsName ? this.#context.host : told.host;
    const key = this.#key;
    if (key === undefined) throw new Error("no key");
    const client = new AgentServiceClient(
      `${host.includes(":") ? `[${host}]` : host}:${told.port}`,
      ChannelCredentials.createSsl(
        this.#context.authority,
        Buffer.from(key.export({ type: "pkcs8", format: "pem" })),
        Buffer.from(certificatePem(issued.certificateDer)),
      ),
      { "grpc.ssl_target_name_override": controllerTlsName, "grpc.use_local_subchannel_pool": 1 },
    );
    const welcomeOrEnd = Promise.withResolvers<void>();
    let finished: Promise<boolean> | undefined;
    await gate(async () => {
      finished = this.#hold(client.session(), welcomeOrEnd.resolve).finally(welcomeOrEnd.resolve);
      await welcomeOrEnd.promise;
    });
    try {
      return (await finished) ?? false;
    } finally {
      client.close();
    }
  }

  #hold(
    stream: ClientDuplexStream<SessionRequest, SessionResponse>,
    onWelcome: () => void,
  ): Promise<boolean> {
    const { signal, counters } = this.#context;
    return new Promise((resolve) => {
      let welcomed = false;
      let timer: NodeJS.Timeout | undefined;
      const send = (message: SessionRequest["message"]): void => {
        stream.write({ message });
      };
      const onAbort = (): void => stream.cancel();
      signal.addEventListener("abort", onAbort, { once: true });
      stream.on("data", ({ message }: SessionResponse) => {
        if (message?.$case === "welcome") {
          welcomed = true;
          this.#context.connectedBy(1);
          if (!this.#wasWelcomed) this.#context.welcomed();
          this.#wasWelcomed = true;
          onWelcome();
          send({ $case: "inventory", value: simulatedInventory(this.#host) });
          if (message.value.desiredState !== undefined) this.#converge(message.value.desiredState, send);
          const sample = (): void => {
            // A queue would only grow where the controller is slow: telemetry may be dropped.
            if (stream.writableLength < 4) {
              counters.telemetryMessages += 1;
              send({
                $case: "telemetry",
                value: {
                  gpuSamples: simulatedSamples(this.#host, Date.now(), this.#workloads.length > 0),
                  hostSamples: [],
                },
              });
            }
            timer = setTimeout(sample, this.#context.telemetryIntervalMs);
          };
          // Spread over the interval, as real agents' start times are.
          timer = setTimeout(sample, Math.random() * this.#context.telemetryIntervalMs);
        } else if (message?.$case === "desiredState") {
          this.#converge(message.value, send);
        }
      });
      stream.on("end", () => stream.end());
      stream.on("error", () => undefined);
      stream.on("status", () => {
        clearTimeout(timer);
        signal.removeEventListener("abort", onAbort);
        if (welcomed) this.#context.connectedBy(-1);
        resolve(welcomed);
      });
      send({
        $case: "hello",
        value: {
          agentVersion: "fleet",
          bootId: this.#bootId,
          capabilities: ["containers"],
          incarnation: this.#incarnation,
          generation: this.#generation,
          journalId: this.#journalId,
          agentTimeUnixMs: Date.now(),
        },
      });
    });
  }

  #converge(desired: DesiredState, send: (message: SessionRequest["message"]) => void): void {
    if (desired.incarnation === this.#incarnation && desired.generation < this.#generation) return;
    this.#context.counters.desiredStates += 1;
    this.#incarnation = desired.incarnation;
    this.#generation = desired.generation;
    const live = new Set(desired.workloads.map((workload) => workload.allocationId));
    for (const id of this.#started) if (!live.has(id)) this.#started.delete(id);
    this.#workloads = desired.workloads.map((workload) => {
      const runs = workload.target === WorkloadDesired_Target.RUNNING;
      if (runs && !this.#started.has(workload.allocationId)) {
        this.#started.add(workload.allocationId);
        this.#context.onStartCommand?.(workload.allocationId, performance.timeOrigin + performance.now());
      }
      return {
        allocationId: workload.allocationId,
        phase: runs ? WorkloadObserved_Phase.RUNNING : WorkloadObserved_Phase.CLEAN,
        reason: "",
        message: "",
        containerId: `fleet-${workload.allocationId}`,
        exitCode: undefined,
        startedAtUnixMs: Date.now(),
        restartCount: 0,
        ports: [],
        holders: [],
        oomKilled: false,
      };
    });
    send({
      $case: "observedState",
      value: {
        incarnation: this.#incarnation,
        generation: this.#generation,
        workloads: [...this.#workloads],
        conditions: [],
      },
    });
  }
}

function createGate(places: number): Gate {
  let running = 0;
  const waiting: (() => void)[] = [];
  return async (work) => {
    if (running >= places) await new Promise<void>((resolve) => waiting.push(resolve));
    else running += 1;
    try {
      return await work();
    } finally {
      const next = waiting.shift();
      if (next === undefined) running -= 1;
      else next();
    }
  };
}

/** Ends early, without an error, when the signal aborts. */
function sleep(ms: number, signal: AbortSignal): Promise<void> {
  if (signal.aborted) return Promise.resolve();
  return new Promise((resolve) => {
    const done = (): void => {
      clearTimeout(timer);
      signal.removeEventListener("abort", done);
      resolve();
    };
    const timer = setTimeout(done, ms);
    signal.addEventListener("abort", done, { once: true });
  });
}
