import { sign, type KeyObject, createPublicKey } from "node:crypto";

/**
 * A certificate signing request (PKCS#10, RFC 2986) for a P-256 key, in DER, with an empty subject: the
 * controller names the server, not the agent. Written by hand because it is thirty bytes around the
 * public key, and a whole X.509 library would cost the agent more memory than the rest of enrolment.
 */
export function createSigningRequest(privateKey: KeyObject): Buffer {
  const publicKey = createPublicKey(privateKey).export({ type: "spki", format: "der" });
  const information = sequence(
    Buffer.of(0x02, 0x01, 0x00), // version 0
    sequence(), // subject: empty
    publicKey,
    Buffer.of(0xa0, 0x00), // no attributes
  );
  const signature = sign("sha256", information, privateKey);
  return sequence(information, sequence(ecdsaWithSha256), bitString(signature));
}

// 1.2.840.10045.4.3.2
const ecdsaWithSha256 = Buffer.from("06082a8648ce3d040302", "hex");

function sequence(...parts: readonly Uint8Array[]): Buffer {
  return tagged(0x30, Buffer.concat(parts));
}

function bitString(content: Uint8Array): Buffer {
  return tagged(0x03, Buffer.concat([Buffer.of(0), content]));
}

function tagged(tag: number, content: Uint8Array): Buffer {
  return Buffer.concat([Buffer.of(tag), encodeLength(content.length), content]);
}

function encodeLength(length: number): Buffer {
  if (length < 0x80) return Buffer.of(length);
  if (length < 0x100) return Buffer.of(0x81, length);
  return Buffer.of(0x82, length >> 8, length & 0xff);
}
