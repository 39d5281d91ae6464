import { createCipheriv, createDecipheriv, randomBytes } from "node:crypto";
import { PlatformError } from "@palebluedot/shared/errors.ts";

/** Encryption of small secrets at rest: AES-256-GCM, layout version(1) | nonce(12) | tag(16) | ciphertext. */
export interface SecretBox {
  /** `context` is authenticated: a value copied to another row does not decrypt there. */
  seal(plaintext: Uint8Array, context: string): Buffer;
  open(sealed: Uint8Array, context: string): Buffer;
}

const version = 1;

export function createSecretBox(key: Uint8Array): SecretBox {
  if (key.length !== 32) {
    throw new PlatformError({
      code: "secret-key-invalid",
      kind: "invalid",
      message: `the secret key has ${key.length} bytes, 32 are needed`,
      hint: "The key file holds 32 random bytes as base64: head -c 32 /dev/urandom | base64",
    });
  }
  return {
    seal(plaintext, context) {
      const nonce = randomBytes(12);
      const cipher = createCipheriv("aes-256-gcm", key, nonce);
      cipher.setAAD(Buffer.from(context));
      const body = Buffer.concat([cipher.update(plaintext), cipher.final()]);
      return Buffer.concat([Buffer.of(version), nonce, cipher.getAuthTag(), body]);
    },
    open(sealed, context) {
      const buffer = Buffer.from(sealed);
      try {
        if (buffer[0] !== version || buffer.length < 29) throw new Error("unknown layout");
        const decipher = createDecipheriv("aes-256-gcm", key, buffer.subarray(1, 13));
        decipher.setAAD(Buffer.from(context));
        decipher.setAuthTag(buffer.subarray(13, 29));
        return Buffer.concat([decipher.update(buffer.subarray(29)), decipher.final()]);
      } catch (cause) {
        throw new PlatformError({
          code: "secret-unreadable",
          kind: "internal",
          message: "a stored secret does not decrypt",
          hint: "Was the key file replaced, or the data restored beside another key?",
          cause,
        });
      }
    },
  };
}
