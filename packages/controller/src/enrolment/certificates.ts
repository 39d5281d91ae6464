// The library keeps its algorithm registry in decorator metadata.
import "reflect-metadata";
import { createHash, randomBytes, webcrypto } from "node:crypto";
import * as x509 from "@peculiar/x509";
import { PlatformError } from "@palebluedot/shared/errors.ts";
import { controllerTlsName } from "@palebluedot/shared/agent-link.ts";

const keyAlgorithm = { name: "ECDSA", namedCurve: "P-256" } as const;
const signingAlgorithm = { name: "ECDSA", hash: "SHA-256" } as const;
const serverAuth = "1.3.6.1.5.5.7.3.1";
const clientAuth = "1.3.6.1.5.5.7.3.2";

// A fresh host's clock may be wrong by years; what a host verifies must hold for any clock. The
// certificates that the controller verifies are short-lived, by the controller's own clock.
const listenerNotBefore = new Date("1970-01-02T00:00:00Z");
// RFC 5280, 4.1.2.5: no well-defined expiry.
const noExpiry = new Date("9999-12-31T23:59:59Z");

/** How far `notBefore` of an agent's certificate lies before its issue: replicas' clocks differ too. */
export const backdateMs = 3_600_000;

export interface CertificateAuthority {
  readonly certificateDer: Buffer;
  readonly certificatePem: string;
  /** sha256 of the DER, lower-case hex. */
  readonly fingerprint: string;
  readonly privateKeyPkcs8: Buffer;
  readonly signingKey: webcrypto.CryptoKey;
  readonly subject: string;
}

export interface IssuedCertificate {
  readonly der: Buffer;
  readonly pem: string;
  /** Lower-case hex without leading zeros, as `certificates.serial`. */
  readonly serial: string;
  readonly notBefore: Date;
  readonly notAfter: Date;
}

/** A self-signed P-256 authority. */
export async function generateAuthority(): Promise<CertificateAuthority> {
  const keys = await webcrypto.subtle.generateKey(keyAlgorithm, true, ["sign", "verify"]);
  const certificate = await x509.X509CertificateGenerator.createSelfSigned({
    serialNumber: newSerial(),
    // The random part tells authorities apart where two are trusted at once.
    name: `CN=Palebluedot CA ${randomBytes(4).toString("hex")}`,
    notBefore: listenerNotBefore,
    notAfter: noExpiry,
    keys,
    signingAlgorithm,
    extensions: [
      new x509.BasicConstraintsExtension(true, 0, true),
      new x509.KeyUsagesExtension(x509.KeyUsageFlags.keyCertSign | x509.KeyUsageFlags.cRLSign, true),
      await x509.SubjectKeyIdentifierExtension.create(keys.publicKey),
    ],
  });
  const pkcs8 = Buffer.from(await webcrypto.subtle.exportKey("pkcs8", keys.privateKey));
  return await loadAuthority(Buffer.from(certificate.rawData), pkcs8);
}

export async function loadAuthority(certificateDer: Buffer, pkcs8: Buffer): Promise<CertificateAuthority> {
  const certificate = new x509.X509Certificate(new Uint8Array(certificateDer));
  return {
    certificateDer,
    certificatePem: certificate.toString("pem"),
    fingerprint: createHash("sha256").update(certificateDer).digest("hex"),
    privateKeyPkcs8: pkcs8,
    signingKey: await webcrypto.subtle.importKey("pkcs8", new Uint8Array(pkcs8), keyAlgorithm, false, [
      "sign",
    ]),
    subject: certificate.subject,
  };
}

/** The listeners' certificate and its key, made anew at every start: the key never touches a disk. */
export async function issueListenerCertificate(
  authority: CertificateAuthority,
  names: readonly string[],
): Promise<{ readonly certificatePem: string; readonly privateKeyPem: string }> {
  const keys = await webcrypto.subtle.generateKey(keyAlgorithm, true, ["sign", "verify"]);
  const alternativeNames = [controllerTlsName, ...names].map((name): x509.JsonGeneralName => ({
    type: isAddress(name) ? "ip" : "dns",
    value: name,
  }));
  const certificate = await x509.X509CertificateGenerator.create({
    serialNumber: newSerial(),
    subject: "CN=Palebluedot controller",
    issuer: authority.subject,
    notBefore: listenerNotBefore,
    notAfter: noExpiry,
    publicKey: keys.publicKey,
    signingKey: authority.signingKey,
    signingAlgorithm,
    extensions: [
      new x509.BasicConstraintsExtension(false, undefined, true),
      new x509.KeyUsagesExtension(x509.KeyUsageFlags.digitalSignature, true),
      // An agent's certificate carries clientAuth alone, so no agent can pose as a controller.
      new x509.ExtendedKeyUsageExtension([serverAuth]),
      new x509.SubjectAlternativeNameExtension(alternativeNames),
    ],
  });
  const pkcs8 = Buffer.from(await webcrypto.subtle.exportKey("pkcs8", keys.privateKey));
  return {
    certificatePem: certificate.toString("pem"),
    privateKeyPem: x509.PemConverter.encode(pkcs8, "PRIVATE KEY"),
  };
}

export async function issueAgentCertificate(
  authority: CertificateAuthority,
  request: { readonly serverId: string; readonly publicKeySpki: Uint8Array },
  nowMs: number,
  lifetimeMs: number,
): Promise<IssuedCertificate> {
  const serial = newSerial();
  // X.509 counts in seconds.
  const notBefore = new Date(Math.floor((nowMs - backdateMs) / 1000) * 1000);
  const notAfter = new Date(Math.ceil((nowMs + lifetimeMs) / 1000) * 1000);
  const publicKey = await webcrypto.subtle.importKey(
    "spki",
    new Uint8Array(request.publicKeySpki),
    keyAlgorithm,
    true,
    ["verify"],
  );
  const certificate = await x509.X509CertificateGenerator.create({
    serialNumber: serial,
    subject: `CN=${request.serverId}`,
    issuer: authority.subject,
    notBefore,
    notAfter,
    publicKey,
    signingKey: authority.signingKey,
    signingAlgorithm,
    extensions: [
      new x509.BasicConstraintsExtension(false, undefined, true),
      new x509.KeyUsagesExtension(x509.KeyUsageFlags.digitalSignature, true),
      new x509.ExtendedKeyUsageExtension([clientAuth]),
      new x509.SubjectAlternativeNameExtension([
        { type: "url", value: `palebluedot://server/${request.serverId}` },
      ]),
    ],
  });
  return {
    der: Buffer.from(certificate.rawData),
    pem: certificate.toString("pem"),
    serial,
    notBefore,
    notAfter,
  };
}

export interface SigningRequest {
  readonly publicKeySpki: Buffer;
  /** sha256 of the SPKI. */
  readonly publicKeySha256: Buffer;
}

/** Parses a PKCS#10 request and checks that its signer holds the key. Throws PlatformError `csr-invalid`. */
export async function readSigningRequest(der: Uint8Array): Promise<SigningRequest> {
  try {
    const request = new x509.Pkcs10CertificateRequest(new Uint8Array(der));
    const algorithm = request.publicKey.algorithm as { name: string; namedCurve?: string };
    if (algorithm.name !== "ECDSA" || algorithm.namedCurve !== "P-256") throw new Error("not a P-256 key");
    if (!(await request.verify())) throw new Error("bad signature");
    const publicKeySpki = Buffer.from(request.publicKey.rawData);
    return { publicKeySpki, publicKeySha256: createHash("sha256").update(publicKeySpki).digest() };
  } catch (cause) {
    throw new PlatformError({
      code: "csr-invalid",
      kind: "invalid",
      message: "the certificate signing request is not a valid PKCS#10 request for a P-256 key",
      hint: "The agent makes the request itself; do not edit the key file.",
      cause,
    });
  }
}

/** 127 random bits, first bit clear and second set: positive, and one length in hex. */
export function newSerial(): string {
  const bytes = randomBytes(16);
  bytes[0] = ((bytes[0] ?? 0) & 0x3f) | 0x40;
  return bytes.toString("hex");
}

function isAddress(name: string): boolean {
  return name.includes(":") || /^\d{1,3}(\.\d{1,3}){3}$/.test(name);
}
