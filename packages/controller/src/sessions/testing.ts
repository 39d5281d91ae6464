import { generateKeyPairSync, type KeyObject } from "node:crypto";
import { randomBytes } from "node:crypto";
import { ChannelCredentials, type ClientDuplexStream, type ServiceError } from "@grpc/grpc-js";
import { pino } from "pino";
import { Registry } from "prom-client";
import { controllerTlsName } from "@palebluedot/shared/agent-link.ts";
import { systemClock, type Clock } from "@palebluedot/shared/clock.ts";
import {
  AgentServiceClient,
  type DesiredState,
  type Hello,
  type ObservedState,
  type SessionRequest,
  type SessionResponse,
} from "@palebluedot/shared/generated/palebluedot/agent/v1/agent.ts";
import {
  EnrolmentServiceClient,
  type EnrolResponse,
  type HardwareIdentity,
  type RenewResponse,
} from "@palebluedot/shared/generated/palebluedot/agent/v1/enrolment.ts";
import { fromGrpcError } from "@palebluedot/shared/grpc-status.ts";
import { certificatePem, fetchPinnedAuthority } from "@palebluedot/shared/pinned-authority.ts";
import { createSigningRequest } from "@palebluedot/shared/pkcs10.ts";
import { createSecretBox, type SecretBox } from "@palebluedot/shared/secret-box.ts";
import type { Sql } from "postgres";
import type { AllocationAgentPort } from "../allocations/types.ts";
import { configSchema } from "../config/config.ts";
import { createNotifications } from "../db/notifications.ts";
import type { Dependencies } from "../dependencies.ts";
import { createFailpoints } from "../reconciler/failpoints.ts";

const key = randomBytes(32);

/** Dependencies on a real database; ports are the system's choice. */
export function testDependencies(
  sql: Sql,
  overrides: { clock?: Clock; replicaId?: string; secrets?: SecretBox; certificateHours?: number } = {},
): Dependencies & { close(): Promise<void> } {
  const log = pino({ level: process.env["PALEBLUEDOT_TEST_LOG"] ?? "silent" });
  const notifications = createNotifications(sql, { log });
  return {
    config: configSchema.parse({
      PALEBLUEDOT_AGENT_HOST: "127.0.0.1",
      PALEBLUEDOT_ENROLMENT_PORT: 0,
      PALEBLUEDOT_AGENT_PORT: 0,
      ...(overrides.certificateHours === undefined
        ? {}
        : { PALEBLUEDOT_CERTIFICATE_HOURS: overrides.certificateHours }),
    }),
    sql,
    clock: overrides.clock ?? systemClock,
    log,
    failpoints: createFailpoints(undefined),
    secrets: overrides.secrets ?? createSecretBox(key),
    notifications,
    metrics: new Registry(),
    replicaId: overrides.replicaId ?? "test-replica",
    close: () => notifications.close(),
  };
}

/** Desired states in memory, and what agents said. Stands for the allocation feature. */
export class MemoryAllocations implements AllocationAgentPort {
  readonly desired = new Map<string, DesiredState>();
  readonly observed: { serverId: string; state: ObservedState; epoch: number }[] = [];
  readonly capacityChanges: string[] = [];

  loadDesiredStates(serverIds: readonly string[]): Promise<Map<string, DesiredState>> {
    return Promise.resolve(
      new Map(
        serverIds.map((id) => [
          id,
          this.desired.get(id) ?? { incarnation: "i", generation: 0, drain: false, workloads: [] },
        ]),
      ),
    );
  }

  observe(serverId: string, state: ObservedState, epoch: number): Promise<void> {
    this.observed.push({ serverId, state, epoch });
    return Promise.resolve();
  }

  capacityChanged(serverIds: readonly string[]): void {
    this.capacityChanges.push(...serverIds);
  }
}

export const noIdentity: HardwareIdentity = {
  smbiosUuid: "",
  serial: "",
  manufacturer: "",
  product: "",
  macAddresses: [],
  bmcMac: "",
  bmcAddress: "",
  hostname: "node",
};

export const newKey = (): KeyObject => generateKeyPairSync("ec", { namedCurve: "P-256" }).privateKey;

export interface EnrolledPeer {
  readonly key: KeyObject;
  readonly serverId: string;
  readonly certificateDer: Buffer;
  readonly authorityDer: Buffer;
  readonly agentPort: number;
}

/** A bare agent: the wire contract and nothing else. */
export class TestPeer {
  readonly #port: number;
  readonly #fingerprint: string;

  constructor(listeners: { readonly enrolmentPort: number; readonly caFingerprint: string }) {
    this.#port = listeners.enrolmentPort;
    this.#fingerprint = listeners.caFingerprint;
  }

  async #client(): Promise<{ client: EnrolmentServiceClient; authorityDer: Buffer }> {
    const authorityDer = await fetchPinnedAuthority({
      host: "127.0.0.1",
      port: this.#port,
      fingerprint: this.#fingerprint,
    });
    const client = new EnrolmentServiceClient(
      `127.0.0.1:${this.#port}`,
      ChannelCredentials.createSsl(Buffer.from(certificatePem(authorityDer))),
      { "grpc.ssl_target_name_override": controllerTlsName },
    );
    return { client, authorityDer };
  }

  async enrol(
    joinToken: string,
    privateKey: KeyObject,
    identity: Partial<HardwareIdentity> = {},
  ): Promise<EnrolResponse & { authorityDer: Buffer }> {
    const { client, authorityDer } = await this.#client();
    try {
      const response = await new Promise<EnrolResponse>((resolve, reject) => {
        client.enrol(
          {
            joinToken,
            csrDer: createSigningRequest(privateKey),
            identity: { ...noIdentity, ...identity },
            agentVersion: "test",
          },
          (error, value) => {
            if (error === null) resolve(value);
            else reject(fromGrpcError(error));
          },
        );
      });
      return { ...response, authorityDer };
    } finally {
      client.close();
    }
  }

  /** Enrols and expects a certificate. */
  async join(
    joinToken: string,
    identity: Partial<HardwareIdentity> = {},
    privateKey: KeyObject = newKey(),
  ): Promise<EnrolledPeer> {
    const response = await this.enrol(joinToken, privateKey, identity);
    if (response.certificateDer.length === 0) throw new Error(`not issued: ${response.message}`);
    return {
      key: privateKey,
      serverId: response.serverId,
      certificateDer: response.certificateDer,
      authorityDer: response.authorityDer,
      agentPort: Number(response.agentEndpoint.replace(/^.*:/, "")),
    };
  }

  async renew(certificateDer: Buffer, privateKey: KeyObject): Promise<RenewResponse> {
    const { client } = await this.#client();
    try {
      return await new Promise<RenewResponse>((resolve, reject) => {
        client.renew({ certificateDer, csrDer: createSigningRequest(privateKey) }, (error, value) => {
          if (error === null) resolve(value);
          else reject(fromGrpcError(error));
        });
      });
    } finally {
      client.close();
    }
  }
}

export function agentClient(peer: EnrolledPeer): AgentServiceClient {
  return new AgentServiceClient(
    `127.0.0.1:${peer.agentPort}`,
    ChannelCredentials.createSsl(
      Buffer.from(certificatePem(peer.authorityDer)),
      Buffer.from(peer.key.export({ type: "pkcs8", format: "pem" })),
      Buffer.from(certificatePem(peer.certificateDer)),
    ),
    { "grpc.ssl_target_name_override": controllerTlsName, "grpc.use_local_subchannel_pool": 1 },
  );
}

type Answer = NonNullable<SessionResponse["message"]>;
type AnswerCase = Answer["$case"];
type AnswerOf = { [Case in AnswerCase]: Extract<Answer, { $case: Case }>["value"] };

/** A control stream whose answers are kept. */
export class TestSession {
  readonly client: AgentServiceClient;
  readonly stream: ClientDuplexStream<SessionRequest, SessionResponse>;
  readonly received: SessionResponse[] = [];
  ended = false;
  error: ServiceError | undefined;

  constructor(peer: EnrolledPeer, hello: Partial<Hello> | null = {}) {
    this.client = agentClient(peer);
    this.stream = this.client.session();
    this.stream.on("data", (message: SessionResponse) => this.received.push(message));
    this.stream.on("end", () => {
      this.ended = true;
    });
    this.stream.on("error", (error: ServiceError) => {
      this.ended = true;
      this.error = error;
    });
    if (hello !== null) this.hello(hello);
  }

  hello(hello: Partial<Hello>): void {
    this.send({
      $case: "hello",
      value: {
        agentVersion: "test",
        bootId: "boot-1",
        capabilities: [],
        incarnation: "",
        generation: 0,
        journalId: "journal-1",
        agentTimeUnixMs: Date.now(),
        ...hello,
      },
    });
  }

  send(message: SessionRequest["message"]): void {
    this.stream.write({ message });
  }

  /** The first answer of a kind (after `skip` of them), waited for. */
  async answer<Case extends AnswerCase>(kind: Case, skip = 0): Promise<AnswerOf[Case]> {
    const found = await eventually(
      () => this.received.filter((one) => one.message?.$case === kind)[skip],
      `${kind} (ended: ${this.ended}, error: ${this.error?.message ?? "none"})`,
    );
    return found.message?.value as AnswerOf[Case];
  }

  close(): void {
    this.stream.cancel();
    this.client.close();
  }
}

/** Polls until there is a value. Fails after ten seconds. */
export async function eventually<T>(
  look: () => T | undefined | Promise<T | undefined>,
  what = "the condition",
): Promise<NonNullable<T>> {
  const deadline = Date.now() + 10_000;
  for (;;) {
    const value = await look();
    if (value !== undefined && value !== null && value !== false) return value;
    if (Date.now() > deadline) throw new Error(`timed out waiting for ${what}`);
    await new Promise((resolve) => setTimeout(resolve, 20));
  }
}
