import type { TransactionSql } from "postgres";
import { appendEvents } from "../events/outbox.ts";
import type { Actor } from "./types.ts";

/** Revokes what is live of a server's certificates, with an event if there was any. Returns how many. */
export async function revokeAllCertificates(
  tx: TransactionSql,
  serverId: string,
  reason: string,
  actor: Actor,
): Promise<number> {
  const revoked = await tx<{ serial: string }[]>`
    update certificates set revoked_at = now(), revoked_reason = ${reason}
    where server_id = ${serverId} and revoked_at is null returning serial`;
  const serials = revoked.map((row) => row.serial);
  if (serials.length > 0) await revocationEvent(tx, serverId, serials, reason, actor);
  return serials.length;
}

export async function revocationEvent(
  tx: TransactionSql,
  serverId: string,
  serials: readonly string[],
  reason: string,
  actor: Actor,
): Promise<void> {
  await appendEvents(tx, [
    {
      type: "server.certificates-revoked",
      severity: "warning",
      serverId,
      actor: actor.name,
      message: `${serials.length} certificate(s) revoked: ${reason}`,
      data: { serials, reason },
    },
  ]);
}
