import { normaliseMac, normaliseSerial, normaliseUuid } from "@palebluedot/shared/identity.ts";
import type { HardwareIdentity } from "@palebluedot/shared/generated/palebluedot/agent/v1/enrolment.ts";
import type { ISql } from "postgres";
import { z } from "zod";

// Shown to operators, so nothing that could rewrite a terminal or a log line survives.
const invisible = /[\p{Cc}\p{Cf}\p{Zl}\p{Zp}�]/gu;
const text = (max: number) =>
  z.string().transform((value) => value.replace(invisible, " ").replace(/\s+/g, " ").trim().slice(0, max));

/** What a host says of itself, cleaned. Placeholders are null: they identify nobody. */
export const identitySchema = z
  .object({
    smbiosUuid: z.string().max(256).transform(normaliseUuid),
    serial: z.string().max(1024).transform(normaliseSerial),
    manufacturer: text(128),
    product: text(128),
    macAddresses: z
      .array(z.string().max(64))
      .max(128)
      .transform((macs) => [...new Set(macs.map(normaliseMac).filter((mac) => mac !== ""))].sort()),
    bmcMac: z.string().max(64).transform(normaliseMac),
    bmcAddress: text(128),
    hostname: text(253),
  })
  .transform((identity) => ({
    smbios_uuid: identity.smbiosUuid || null,
    serial: identity.serial || null,
    manufacturer: identity.manufacturer,
    product: identity.product,
    mac_addresses: identity.macAddresses,
    bmc_mac: identity.bmcMac || null,
    bmc_address: identity.bmcAddress || null,
    hostname: identity.hostname,
  }));

export type CleanIdentity = z.infer<typeof identitySchema>;

export function parseIdentity(identity: HardwareIdentity | undefined): CleanIdentity {
  return identitySchema.parse(
    identity ?? {
      smbiosUuid: "",
      serial: "",
      manufacturer: "",
      product: "",
      macAddresses: [],
      bmcMac: "",
      bmcAddress: "",
      hostname: "",
    },
  );
}

/** Takes turns with every enrolment that names one of the same identifiers, so that none is created twice. */
export async function lockIdentity(
  tx: ISql,
  publicKeySha256: Buffer,
  identity: CleanIdentity,
): Promise<void> {
  const names = [
    `key:${publicKeySha256.toString("hex")}`,
    ...(identity.serial === null ? [] : [`serial:${identity.serial}`]),
    ...(identity.smbios_uuid === null ? [] : [`uuid:${identity.smbios_uuid}`]),
    ...[...identity.mac_addresses, ...(identity.bmc_mac === null ? [] : [identity.bmc_mac])].map(
      (mac) => `mac:${mac}`,
    ),
  ];
  // Locked in the order of the hashes, the same for everybody: no deadlock.
  await tx`
    select pg_advisory_xact_lock(7305002, key) from (
      select distinct hashtext(name) as key from unnest(${[...new Set(names)]}::text[]) as name order by 1
    ) as keys`;
}

export interface Candidate {
  readonly id: string;
  readonly name: string;
  readonly hadCertificate: boolean;
  readonly hasRequest: boolean;
}

/** The servers that this identity could be. Empty for an identity of placeholders. */
export async function findCandidates(tx: ISql, identity: CleanIdentity): Promise<readonly Candidate[]> {
  return await tx<Candidate[]>`
    select s.id, s.name,
      exists (select 1 from certificates c where c.server_id = s.id) as "hadCertificate",
      exists (select 1 from enrolment_requests r where r.server_id = s.id) as "hasRequest"
    from servers s
    where s.state <> 'retired' and s.id in (
      select id from servers where serial = ${identity.serial}
      union select id from servers where smbios_uuid = ${identity.smbios_uuid}
      union select id from servers where bmc_mac = ${identity.bmc_mac}
      union select server_id from server_macs where mac = any(${identity.mac_addresses})
    )
    order by s.id limit 20`;
}

/** Fills what the record does not know yet; what an operator wrote stays. */
export async function completeRecord(tx: ISql, serverId: string, identity: CleanIdentity): Promise<void> {
  await tx`
    update servers set
      serial = coalesce(serial, ${identity.serial}),
      smbios_uuid = coalesce(smbios_uuid, ${identity.smbios_uuid}),
      bmc_mac = coalesce(bmc_mac, ${identity.bmc_mac}),
      bmc_address = coalesce(bmc_address, ${identity.bmc_address}),
      updated_at = now()
    where id = ${serverId}`;
  await tx`
    insert into server_macs (mac, server_id)
    select mac, ${serverId} from unnest(${identity.mac_addresses}::text[]) as mac
    on conflict do nothing`;
}
