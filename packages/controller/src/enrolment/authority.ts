import type { Sql } from "postgres";
import { uuidv7 } from "uuidv7";
import type { SecretBox } from "@palebluedot/shared/secret-box.ts";
import { generateAuthority, loadAuthority, type CertificateAuthority } from "./certificates.ts";

// Arbitrary, but the same in every replica.
const authorityLock = 7_305_001;

/**
 * The installation's certificate authorities, newest first: the first one signs, all are trusted. Made at the
 * first start; replicas that start together agree on one because they take turns.
 */
export async function ensureAuthorities(deps: {
  readonly sql: Sql;
  readonly secrets: SecretBox;
}): Promise<readonly [CertificateAuthority, ...CertificateAuthority[]]> {
  return await deps.sql.begin(async (tx) => {
    await tx`select pg_advisory_xact_lock(${authorityLock})`;
    const rows = await tx<{ id: string; certificate_der: Buffer; private_key_encrypted: Buffer }[]>`
      select id, certificate_der, private_key_encrypted from certificate_authorities
      where retired_at is null order by created_at desc, id desc`;
    const loaded = await Promise.all(
      rows.map((row) =>
        loadAuthority(row.certificate_der, deps.secrets.open(row.private_key_encrypted, context(row.id))),
      ),
    );
    const [first, ...rest] = loaded;
    if (first !== undefined) return [first, ...rest] as const;

    const id = uuidv7();
    const authority = await generateAuthority();
    await tx`
      insert into certificate_authorities (id, certificate_der, private_key_encrypted)
      values (${id}, ${authority.certificateDer}, ${deps.secrets.seal(authority.privateKeyPkcs8, context(id))})`;
    return [authority] as const;
  });
}

function context(id: string): string {
  return `certificate-authority:${id}`;
}
