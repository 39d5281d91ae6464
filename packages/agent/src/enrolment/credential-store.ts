import {
  createPrivateKey,
  createPublicKey,
  createHash,
  generateKeyPairSync,
  X509Certificate,
  type KeyObject,
} from "node:crypto";
import { mkdir, readFile, rename, rm } from "node:fs/promises";
import { join } from "node:path";
import { PlatformError } from "@palebluedot/shared/errors.ts";
import { certificatePem } from "@palebluedot/shared/pinned-authority.ts";
import { z } from "zod";
import { writeFileAtomic } from "../reconcile/atomic-file.ts";

const recordSchema = z.object({
  server_id: z.uuid(),
  agent_endpoint: z.string().min(1),
  /** By the controller's clock. */
  issued_at_unix_ms: z.number(),
  expires_at_unix_ms: z.number(),
});

export interface Credentials {
  readonly serverId: string;
  /** host:port of the mutual-TLS listener. */
  readonly agentEndpoint: string;
  readonly privateKeyPem: string;
  readonly certificatePem: string;
  readonly authorityPem: string;
  /** By the controller's clock. */
  readonly issuedAtUnixMs: number;
  readonly expiresAtUnixMs: number;
}

/**
 * Key, certificate and authority on disk, each with mode 0600 in a directory of mode 0700. The key is written
 * before it is used for the first time: a crash between request and answer does not cost the enrolment.
 */
export interface CredentialStore {
  /** Makes one at the first call. */
  key(): Promise<KeyObject>;
  /** Lower-case hex; what operators see beside a waiting enrolment. */
  keySha256(): Promise<string>;
  /** Undefined until the first contact, or when it does not match the pinned fingerprint. */
  authority(fingerprint: string): Promise<Buffer | undefined>;
  saveAuthority(der: Buffer): Promise<void>;
  /** Undefined until enrolled, or when what is on disk does not belong together. */
  load(fingerprint: string): Promise<Credentials | undefined>;
  save(
    certificateDer: Buffer,
    record: {
      readonly serverId: string;
      readonly agentEndpoint: string;
      readonly controllerTimeUnixMs: number;
    },
  ): Promise<void>;
  /** Puts key and certificate aside (revoked): the next enrolment has a new key. */
  retire(): Promise<void>;
}

export async function createCredentialStore(dir: string): Promise<CredentialStore> {
  await mkdir(dir, { recursive: true, mode: 0o700 });
  const file = (name: string): string => join(dir, name);
  const read = async (name: string): Promise<string | undefined> => {
    try {
      return await readFile(file(name), "utf8");
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code === "ENOENT") return undefined;
      throw new PlatformError({
        code: "credentials-unreadable",
        kind: "internal",
        message: `${file(name)} cannot be read`,
        hint: "Run the agent as the user that owns its data directory.",
        cause: error,
      });
    }
  };
  const loadOrMakeKey = async (): Promise<KeyObject> => {
    const pem = await read("key.pem");
    if (pem !== undefined) return createPrivateKey(pem);
    const { privateKey } = generateKeyPairSync("ec", { namedCurve: "P-256" });
    await writeFileAtomic(file("key.pem"), privateKey.export({ type: "pkcs8", format: "pem" }));
    return privateKey;
  };
  // One look for all callers: two that came at once would each make a key.
  let cachedKey: Promise<KeyObject> | undefined;

  const store: CredentialStore = {
    key() {
      cachedKey ??= loadOrMakeKey().catch((error: unknown) => {
        cachedKey = undefined;
        throw error;
      });
      return cachedKey;
    },

    async keySha256() {
      const spki = createPublicKey(await store.key()).export({ type: "spki", format: "der" });
      return createHash("sha256").update(spki).digest("hex");
    },

    async authority(fingerprint) {
      const pem = await read("ca.pem");
      if (pem === undefined) return undefined;
      const der = new X509Certificate(pem).raw;
      return createHash("sha256").update(der).digest("hex") === fingerprint ? der : undefined;
    },

    saveAuthority: (der) => writeFileAtomic(file("ca.pem"), certificatePem(der)),

    async load(fingerprint) {
      const [certificate, record, authority, key] = await Promise.all([
        read("certificate.pem"),
        read("enrolment.json"),
        store.authority(fingerprint),
        store.key(),
      ]);
      if (certificate === undefined || record === undefined || authority === undefined) return undefined;
      const parsed = recordSchema.safeParse(parseJson(record));
      // Files of two different moments (a restored backup) are as good as none.
      if (!parsed.success || !new X509Certificate(certificate).checkPrivateKey(key)) return undefined;
      return {
        serverId: parsed.data.server_id,
        agentEndpoint: parsed.data.agent_endpoint,
        privateKeyPem: key.export({ type: "pkcs8", format: "pem" }).toString(),
        certificatePem: certificate,
        authorityPem: certificatePem(authority),
        issuedAtUnixMs: parsed.data.issued_at_unix_ms,
        expiresAtUnixMs: parsed.data.expires_at_unix_ms,
      };
    },

    async save(certificateDer, record) {
      await writeFileAtomic(file("certificate.pem"), certificatePem(certificateDer));
      await writeFileAtomic(
        file("enrolment.json"),
        `${JSON.stringify({
          server_id: record.serverId,
          agent_endpoint: record.agentEndpoint,
          issued_at_unix_ms: record.controllerTimeUnixMs,
          expires_at_unix_ms: new X509Certificate(certificateDer).validToDate.getTime(),
        })}\n`,
      );
    },

    async retire() {
      cachedKey = undefined;
      await rename(file("key.pem"), file("key.revoked.pem")).catch(() => undefined);
      await rm(file("certificate.pem"), { force: true });
      await rm(file("enrolment.json"), { force: true });
    },
  };
  return store;
}

function parseJson(text: string): unknown {
  try {
    return JSON.parse(text);
  } catch {
    return undefined;
  }
}
