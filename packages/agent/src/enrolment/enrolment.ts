import { readFile } from "node:fs/promises";
import { ChannelCredentials, Metadata } from "@grpc/grpc-js";
import { controllerTlsName, maxEnrolmentMessageBytes } from "@palebluedot/shared/agent-link.ts";
import { fullJitterMs } from "@palebluedot/shared/backoff.ts";
import type { Clock } from "@palebluedot/shared/clock.ts";
import { errorMessage, isPlatformError, PlatformError } from "@palebluedot/shared/errors.ts";
import {
  EnrolmentServiceClient,
  EnrolState,
  type EnrolResponse,
  type HardwareIdentity,
  type RenewResponse,
} from "@palebluedot/shared/generated/palebluedot/agent/v1/enrolment.ts";
import { fromGrpcError } from "@palebluedot/shared/grpc-status.ts";
import type { Logger } from "@palebluedot/shared/logger.ts";
import { certificatePem, fetchPinnedAuthority, splitHostPort } from "@palebluedot/shared/pinned-authority.ts";
import { createSigningRequest } from "@palebluedot/shared/pkcs10.ts";
import { createCredentialStore, type Credentials } from "./credential-store.ts";

const callDeadlineMs = 30_000;
const backoff = { baseMs: 1000, capMs: 60_000 } as const;
/** Refused: only a person can change that, so the controller is asked rarely. */
const refusedBackoff = { baseMs: 15_000, capMs: 300_000 } as const;
/** Between attempts to renew because a connection failed. */
const renewalSpacingMs = 60_000;

/** Answers that mean: this key will never get a certificate again. */
const lostKeyCodes: ReadonlySet<string> = new Set([
  "certificate-revoked",
  "key-revoked",
  "certificate-unknown",
  "server-retired",
]);

export interface EnrolmentOptions {
  /** host:port */
  readonly controller: string;
  readonly caFingerprint: string;
  readonly joinTokenFile: string | undefined;
  /** Directory for key and certificate. */
  readonly dir: string;
  readonly agentVersion: string;
  readonly identity: () => Promise<HardwareIdentity>;
  readonly clock: Clock;
  readonly log: Logger;
  readonly random?: () => number;
  /** Throw when enrolment is refused, instead of asking again later. */
  readonly exitOnRefusal?: boolean;
}

export interface Enrolment {
  /** Enrols or renews as needed, however long it takes. Rejects when the signal aborts (or on refusal, if so configured). */
  ensure(signal: AbortSignal): Promise<Credentials>;
  /** Renews at two thirds of the certificate's life, until the signal aborts. */
  keepFresh(onRenewed: (credentials: Credentials) => void, signal: AbortSignal): Promise<void>;
  /**
   * A connection failed: the certificate may have expired without this host's clock knowing. Asks for a new one,
   * at most once a minute.
   */
  connectionFailed(): Promise<void>;
  /** Milliseconds to add to this host's clock to have the controller's. */
  clockOffsetMs(): number;
  /** The controller's clock was seen. */
  controllerTime(unixMs: number): void;
}

export async function createEnrolment(options: EnrolmentOptions): Promise<Enrolment> {
  const { clock, log } = options;
  const random = options.random ?? Math.random;
  const store = await createCredentialStore(options.dir);
  const address = splitHostPort(options.controller, 8443);
  let offsetMs = 0;
  let lastRenewalAttemptMs = 0;
  let renewing: Promise<Credentials | undefined> | undefined;

  const now = (): number => clock.now() + offsetMs;

  function controllerTime(unixMs: number): void {
    offsetMs = unixMs - clock.now();
    if (Math.abs(offsetMs) > 120_000) {
      log.warn(
        { offset_seconds: Math.round(offsetMs / 1000) },
        "this host's clock differs from the controller's",
      );
    }
  }

  /** A controller that was not told its public name answers with the name in its certificate. */
  function reachable(endpoint: string): string {
    const told = splitHostPort(endpoint, 8444);
    const host = told.host === controllerTlsName ? address.host : told.host;
    return `${host.includes(":") ? `[${host}]` : host}:${told.port}`;
  }

  async function authority(): Promise<Buffer> {
    const known = await store.authority(options.caFingerprint);
    if (known !== undefined) return known;
    const der = await fetchPinnedAuthority({ ...address, fingerprint: options.caFingerprint });
    await store.saveAuthority(der);
    return der;
  }

  async function call<T>(
    work: (
      client: EnrolmentServiceClient,
      done: (error: Parameters<typeof fromGrpcError>[0] | null, value: T) => void,
    ) => void,
  ): Promise<T> {
    const client = new EnrolmentServiceClient(
      `${address.host.includes(":") ? `[${address.host}]` : address.host}:${address.port}`,
      ChannelCredentials.createSsl(Buffer.from(certificatePem(await authority()))),
      {
        "grpc.ssl_target_name_override": controllerTlsName,
        "grpc.max_receive_message_length": maxEnrolmentMessageBytes,
      },
    );
    try {
      return await new Promise<T>((resolve, reject) => {
        work(client, (error, value) => {
          if (error === null) resolve(value);
          else reject(fromGrpcError(error));
        });
      });
    } finally {
      client.close();
    }
  }

  async function enrolOnce(): Promise<EnrolResponse> {
    const key = await store.key();
    const identity = await options.identity();
    const joinToken = await readJoinToken(options.joinTokenFile);
    // A deadline is absolute, by this process's own clock.
    return await call<EnrolResponse>((client, done) => {
      client.enrol(
        { joinToken, csrDer: createSigningRequest(key), identity, agentVersion: options.agentVersion },
        new Metadata(),
        { deadline: Date.now() + callDeadlineMs },
        done,
      );
    });
  }

  async function renew(credentials: Credentials): Promise<Credentials> {
    lastRenewalAttemptMs = clock.now();
    const key = await store.key();
    const response = await call<RenewResponse>((client, done) => {
      client.renew(
        { certificateDer: derOf(credentials.certificatePem), csrDer: createSigningRequest(key) },
        new Metadata(),
        { deadline: Date.now() + callDeadlineMs },
        done,
      );
    });
    controllerTime(response.controllerTimeUnixMs);
    await store.save(response.certificateDer, {
      serverId: credentials.serverId,
      agentEndpoint: reachable(response.agentEndpoint),
      controllerTimeUnixMs: response.controllerTimeUnixMs,
    });
    log.info({ server_id: credentials.serverId }, "certificate renewed");
    const renewed = await store.load(options.caFingerprint);
    if (renewed === undefined) throw new Error("the renewed certificate does not load");
    return renewed;
  }

  async function enrol(signal: AbortSignal): Promise<Credentials> {
    for (let attempt = 0; ; attempt += 1) {
      signal.throwIfAborted();
      let waitMs: number;
      try {
        const response = await enrolOnce();
        controllerTime(response.controllerTimeUnixMs);
        if (response.state === EnrolState.ISSUED) {
          await store.save(response.certificateDer, {
            serverId: response.serverId,
            agentEndpoint: reachable(response.agentEndpoint),
            controllerTimeUnixMs: response.controllerTimeUnixMs,
          });
          const credentials = await store.load(options.caFingerprint);
          if (credentials === undefined) throw new Error("the certificate is not for this key");
          log.info({ server_id: credentials.serverId }, "enrolled");
          return credentials;
        }
        log.info(
          {
            server_id: response.serverId,
            public_key_sha256: await store.keySha256(),
            reason: response.message,
          },
          "waiting for an operator's approval",
        );
        attempt = 0;
        waitMs = Math.max(1, response.retryAfterSeconds) * 1000 * (0.5 + random());
      } catch (error) {
        const refused = isPlatformError(error) && error.kind !== "unavailable" && error.kind !== "internal";
        if (refused && options.exitOnRefusal === true) throw error;
        const { code, hint } = isPlatformError(error) ? error : { code: undefined, hint: undefined };
        log.warn({ code, hint, reason: errorMessage(error) }, "enrolment did not succeed; it is tried again");
        // A rejected or revoked key stays so.
        if (code !== undefined && lostKeyCodes.has(code)) await store.retire();
        waitMs = 500 + fullJitterMs(attempt, refused ? refusedBackoff : backoff, random);
      }
      await clock.sleep(waitMs, signal);
    }
  }

  /** Undefined: the key is lost, enrol anew. */
  function renewOrKeep(credentials: Credentials): Promise<Credentials | undefined> {
    // The timer and a failed connection may both want it: one call, one set of files.
    renewing ??= tryRenewal(credentials).finally(() => {
      renewing = undefined;
    });
    return renewing;
  }

  async function tryRenewal(credentials: Credentials): Promise<Credentials | undefined> {
    try {
      return await renew(credentials);
    } catch (error) {
      if (isPlatformError(error) && lostKeyCodes.has(error.code)) {
        log.error(
          { code: error.code, reason: error.message },
          "this host's certificate is no longer accepted",
        );
        await store.retire();
        return undefined;
      }
      log.warn({ reason: errorMessage(error) }, "the certificate could not be renewed yet");
      return credentials;
    }
  }

  return {
    async ensure(signal) {
      for (let attempt = 0; ; attempt += 1) {
        signal.throwIfAborted();
        const credentials = await store.load(options.caFingerprint);
        if (credentials === undefined) return await enrol(signal);
        if (now() < renewalDueMs(credentials)) return credentials;
        const renewed = await renewOrKeep(credentials);
        if (renewed === undefined) continue;
        // Not renewed but not expired either: good enough to connect.
        if (renewed.certificatePem !== credentials.certificatePem || now() < credentials.expiresAtUnixMs)
          return renewed;
        await clock.sleep(500 + fullJitterMs(attempt, backoff, random), signal);
      }
    },

    async keepFresh(onRenewed, signal) {
      for (let failures = 0; ;) {
        const credentials = await store.load(options.caFingerprint);
        const dueMs = credentials === undefined ? backoff.capMs : renewalDueMs(credentials) - now();
        // In pieces: the clock may be set meanwhile, and a timer holds at most 24 days.
        await clock.sleep(Math.min(Math.max(dueMs, failures > 0 ? 1000 * 2 ** failures : 0), 60_000), signal);
        if (credentials === undefined || now() < renewalDueMs(credentials)) continue;
        const renewed = await renewOrKeep(credentials);
        failures = renewed?.certificatePem === credentials.certificatePem ? Math.min(failures + 1, 6) : 0;
        if (renewed !== undefined && renewed.certificatePem !== credentials.certificatePem)
          onRenewed(renewed);
      }
    },

    async connectionFailed() {
      if (clock.now() - lastRenewalAttemptMs < renewalSpacingMs) return;
      const credentials = await store.load(options.caFingerprint);
      if (credentials !== undefined) await renewOrKeep(credentials);
    },

    clockOffsetMs: () => offsetMs,
    controllerTime,
  };
}

function renewalDueMs(credentials: Credentials): number {
  return credentials.issuedAtUnixMs + ((credentials.expiresAtUnixMs - credentials.issuedAtUnixMs) * 2) / 3;
}

async function readJoinToken(path: string | undefined): Promise<string> {
  try {
    if (path === undefined) throw new Error("no file is named");
    const token = (await readFile(path, "utf8")).trim();
    if (!/^pbj_[\w-]{16,128}$/.test(token)) throw new Error("the file holds no join token");
    return token;
  } catch (cause) {
    throw new PlatformError({
      code: "join-token-unreadable",
      kind: "invalid",
      message: `this host is not enrolled, and its join token cannot be read: ${errorMessage(cause)}`,
      hint: "Make one with `pbd join-token create`, write it to a file with mode 0600, and name the file in PALEBLUEDOT_JOIN_TOKEN_FILE.",
      cause,
    });
  }
}

function derOf(pem: string): Buffer {
  return Buffer.from(pem.replace(/-----[^-]+-----|\s/g, ""), "base64");
}
