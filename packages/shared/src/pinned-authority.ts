import { createHash } from "node:crypto";
import { isIP } from "node:net";
import { connect, type DetailedPeerCertificate } from "node:tls";
import { PlatformError } from "@palebluedot/shared/errors.ts";

const maxChain = 8;

/** Lower-case hex without separators, from any of the forms that tools print. "" when it is no SHA-256. */
export function normaliseFingerprint(text: string): string {
  const hex = text
    .trim()
    .replace(/^sha-?256[:=/ ]/i, "")
    .replaceAll(":", "")
    .toLowerCase();
  return /^[0-9a-f]{64}$/.test(hex) ? hex : "";
}

/**
 * First contact: fetches the certificate authority whose SHA-256 fingerprint was told by other means. Nothing
 * but the handshake is exchanged here, so it does not matter yet who answers; every later connection
 * verifies against the authority that this returns (DER). Throws PlatformError `controller-unreachable` or
 * `ca-fingerprint-mismatch`.
 */
export function fetchPinnedAuthority(options: {
  readonly host: string;
  readonly port: number;
  readonly fingerprint: string;
  readonly timeoutMs?: number;
}): Promise<Buffer> {
  const wanted = normaliseFingerprint(options.fingerprint);
  return new Promise((resolve, reject) => {
    const socket = connect({
      host: options.host,
      port: options.port,
      ...(isIP(options.host) === 0 ? { servername: options.host } : {}),
      ALPNProtocols: ["h2"],
      // Judged by the fingerprint below.
      rejectUnauthorized: false,
    });
    const fail = (cause: Error): void => {
      socket.destroy();
      reject(
        new PlatformError({
          code: "controller-unreachable",
          kind: "unavailable",
          message: `no TLS connection to ${options.host}:${options.port}: ${cause.message}`,
          hint: "Check the controller's address, its enrolment port and the firewall between.",
          cause,
        }),
      );
    };
    socket.setTimeout(options.timeoutMs ?? 10_000, () => fail(new Error("timed out")));
    socket.once("error", fail);
    socket.once("secureConnect", () => {
      const found = chainOf(socket.getPeerCertificate(true)).find(
        (der) => createHash("sha256").update(der).digest("hex") === wanted,
      );
      socket.destroy();
      if (found !== undefined) {
        resolve(found);
        return;
      }
      reject(
        new PlatformError({
          code: "ca-fingerprint-mismatch",
          kind: "forbidden",
          message: `${options.host}:${options.port} does not show the certificate authority with the pinned fingerprint`,
          hint: "Compare PALEBLUEDOT_CA_FINGERPRINT with the controller's; if they should match, somebody stands between.",
        }),
      );
    });
  });
}

function chainOf(leaf: DetailedPeerCertificate): Buffer[] {
  const chain: Buffer[] = [];
  let certificate: DetailedPeerCertificate | undefined = leaf;
  while (certificate?.raw !== undefined && chain.length < maxChain) {
    chain.push(certificate.raw);
    // A self-signed certificate is its own issuer.
    certificate = certificate.issuerCertificate === certificate ? undefined : certificate.issuerCertificate;
  }
  return chain;
}

/** "host:port" or "[v6]:port". Throws PlatformError `address-invalid`. */
export function splitHostPort(address: string, defaultPort: number): { host: string; port: number } {
  const match = /^(?:\[([0-9a-fA-F:.%]+)\]|([^:[\]/\s]+))(?::(\d{1,5}))?$/.exec(address.trim());
  const port = Number(match?.[3] ?? defaultPort);
  const host = match?.[1] ?? match?.[2];
  if (host === undefined || port < 1 || port > 65_535) {
    throw new PlatformError({
      code: "address-invalid",
      kind: "invalid",
      message: `${JSON.stringify(address)} is no host:port`,
      hint: "For example controller.example.com:8443, 10.0.0.5:8443 or [fd00::5]:8443.",
    });
  }
  return { host, port };
}

export function certificatePem(der: Uint8Array): string {
  const lines =
    Buffer.from(der)
      .toString("base64")
      .match(/.{1,64}/g) ?? [];
  return `-----BEGIN CERTIFICATE-----\n${lines.join("\n")}\n-----END CERTIFICATE-----\n`;
}
