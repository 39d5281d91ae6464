import { X509Certificate } from "node:crypto";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { createTestDatabase, type TestDatabase } from "../db/testing.ts";
import { startAgentListeners, type AgentListeners } from "../sessions/listeners.ts";
import {
  eventually,
  MemoryAllocations,
  newKey,
  TestPeer,
  testDependencies,
  TestSession,
} from "../sessions/testing.ts";
import type { NewJoinToken } from "./types.ts";

const operator = { name: "token:test" };
let database: TestDatabase;
let deps: ReturnType<typeof testDependencies>;
let listeners: AgentListeners;
let peer: TestPeer;

beforeAll(async () => {
  database = await createTestDatabase();
  deps = testDependencies(database.sql);
  listeners = await startAgentListeners(deps, { allocations: new MemoryAllocations() });
  peer = new TestPeer(listeners);
});

afterAll(async () => {
  await listeners?.stop();
  await deps?.close();
  await database?.close();
});

async function token(input: Partial<NewJoinToken> = {}): Promise<string> {
  const made = await listeners.enrolment.createJoinToken({ name: "t", maxUses: 100, ...input }, operator);
  return made.token;
}

async function uses(secret: string): Promise<number> {
  const { hashJoinToken } = await import("./join-tokens.ts");
  const [row] = await database.sql<{ uses: number }[]>`
    select uses from join_tokens where token_sha256 = ${hashJoinToken(secret)}`;
  return row?.uses ?? -1;
}

const state = async (serverId: string): Promise<string | undefined> =>
  (await database.sql<{ state: string }[]>`select state from servers where id = ${serverId}`)[0]?.state;

describe("join tokens", () => {
  test("are stored hashed, and told once", async () => {
    const { token: secret, joinToken } = await listeners.enrolment.createJoinToken({ name: "x" }, operator);
    expect(secret).toMatch(/^pbj_[\w-]{43}$/);
    const rows = await database.sql`select * from join_tokens where id = ${joinToken.id}`;
    expect(JSON.stringify(rows)).not.toContain(secret.slice(4));
  });

  test.each([
    ["unknown", async () => "pbj_nonsense"],
    ["empty", async () => ""],
    [
      "expired",
      async () => {
        const secret = await token();
        await database.sql`update join_tokens set expires_at = now() - interval '1 second'`;
        return secret;
      },
    ],
    [
      "revoked",
      async () => {
        const made = await listeners.enrolment.createJoinToken({ name: "r" }, operator);
        await listeners.enrolment.revokeJoinToken(made.joinToken.id, operator);
        return made.token;
      },
    ],
    [
      "used up",
      async () => {
        const secret = await token({ maxUses: 1, autoApprove: true });
        await peer.join(secret);
        return secret;
      },
    ],
  ])("an %s one is refused", async (_name, make) => {
    const before = await database.sql`select count(*)::int as n from servers`;
    const secret = await make();
    const made = await database.sql`select count(*)::int as n from servers`;
    await expect(peer.enrol(secret, newKey())).rejects.toMatchObject({ code: "join-token-refused" });
    expect(await database.sql`select count(*)::int as n from servers`).toEqual(made);
    expect(before.length).toBe(1);
  });

  test("concurrent uses never exceed the limit", async () => {
    const secret = await token({ maxUses: 3, autoApprove: true });
    const results = await Promise.allSettled(Array.from({ length: 8 }, () => peer.join(secret)));
    expect(results.filter((result) => result.status === "fulfilled")).toHaveLength(3);
    expect(await uses(secret)).toBe(3);
  });

  test("bound to a server they have one use", async () => {
    const { serverId } = await peer.join(await token({ autoApprove: true }));
    await expect(
      listeners.enrolment.createJoinToken({ name: "b", serverId, maxUses: 2 }, operator),
    ).rejects.toMatchObject({ code: "join-token-invalid" });
  });
});

describe("identity", () => {
  test("a repeated call with the same key uses nothing up and gets the same server", async () => {
    const secret = await token({ autoApprove: true, maxUses: 2 });
    const key = newKey();
    const first = await peer.join(secret, { serial: "SN-REPEAT-1" }, key);
    const second = await peer.join(secret, { serial: "SN-REPEAT-1" }, key);
    expect(second.serverId).toBe(first.serverId);
    expect(await uses(secret)).toBe(1);
    expect(await state(first.serverId)).toBe("verifying");
  });

  test("an unknown host waits for approval, then gets its certificate", async () => {
    const secret = await token();
    const key = newKey();
    const waiting = await peer.enrol(secret, key, { serial: "SN-WAIT-1", hostname: "gpu-7" });
    expect(waiting.certificateDer).toHaveLength(0);
    expect(await state(waiting.serverId)).toBe("pending");
    await listeners.enrolment.approveServer(waiting.serverId, operator);
    expect(await state(waiting.serverId)).toBe("verifying");
    const joined = await peer.join(secret, { serial: "SN-WAIT-1" }, key);
    expect(joined.serverId).toBe(waiting.serverId);
    expect(await uses(secret)).toBe(1);
    const certificate = new X509Certificate(joined.certificateDer);
    expect(certificate.subjectAltName).toBe(`URI:palebluedot://server/${joined.serverId}`);
    expect(certificate.validFromDate.getTime()).toBeLessThan(Date.now() - 3_000_000);
  });

  test("a rejected host stays out", async () => {
    const secret = await token();
    const key = newKey();
    const waiting = await peer.enrol(secret, key, { serial: "SN-REJ-1" });
    await listeners.enrolment.rejectEnrolment(waiting.serverId, operator, { reason: "not ours" });
    await expect(peer.enrol(secret, key, { serial: "SN-REJ-1" })).rejects.toMatchObject({
      code: "enrolment-rejected",
    });
  });

  test("a host that an operator wrote down before is matched by any of its identifiers", async () => {
    const id = "01900000-0000-7000-8000-000000000001";
    await database.sql`insert into servers (id, name, state) values (${id}, 'rack-1-1', 'pending')`;
    await database.sql`insert into server_macs (mac, server_id) values ('52:54:00:aa:00:01', ${id})`;
    const joined = await peer.join(await token(), {
      serial: "SN-PRE-1",
      macAddresses: ["52-54-00-AA-00-01"],
    });
    expect(joined.serverId).toBe(id);
    expect(await state(id)).toBe("verifying");
  });

  test("placeholders identify nobody", async () => {
    const secret = await token({ autoApprove: true });
    const identity = {
      serial: "To be filled by O.E.M.",
      smbiosUuid: "FFFFFFFF-FFFF-FFFF-FFFF-FFFFFFFFFFFF",
      macAddresses: ["00:00:00:00:00:00"],
    };
    const first = await peer.join(secret, identity);
    const second = await peer.join(secret, identity);
    expect(second.serverId).not.toBe(first.serverId);
  });

  test("an attacker who knows a serial and a multi-use token cannot take the server over", async () => {
    const secret = await token({ autoApprove: true });
    const identity = { serial: "SN-VICTIM", smbiosUuid: "4c4c4544-0042-3510-8051-b7c04f4d3232" };
    const victim = await peer.join(secret, identity);
    const session = new TestSession(victim);
    await session.answer("welcome");

    const key = newKey();
    const attack = await peer.enrol(secret, key, identity);
    expect(attack.certificateDer).toHaveLength(0);
    expect(attack.serverId).toBe(victim.serverId);
    const again = await peer.enrol(secret, key, identity);
    expect(again.certificateDer).toHaveLength(0);
    // Nor by naming one identifier only.
    expect((await peer.enrol(secret, newKey(), { serial: "SN-VICTIM" })).certificateDer).toHaveLength(0);

    // The victim did not notice.
    expect(listeners.registry.isConnected(victim.serverId)).toBe(true);
    expect(session.ended).toBe(false);
    await expect(peer.renew(victim.certificateDer, victim.key)).resolves.toBeDefined();
    // With two waiting, an approval must name the key.
    await expect(listeners.enrolment.approveServer(victim.serverId, operator)).rejects.toMatchObject({
      code: "enrolment-ambiguous",
    });
    session.close();
  });

  test("a new key by a bound token replaces the old one, whose session ends", async () => {
    const identity = { serial: "SN-REINSTALL" };
    const old = await peer.join(await token({ autoApprove: true }), identity);
    const session = new TestSession(old);
    await session.answer("welcome");
    const bound = await token({ serverId: old.serverId, maxUses: 1 });
    const fresh = await peer.join(bound, identity);
    expect(fresh.serverId).toBe(old.serverId);
    expect((await session.answer("goodbye")).reason).toBe(2);
    await expect(peer.renew(old.certificateDer, old.key)).rejects.toMatchObject({
      code: "certificate-revoked",
    });
    await expect(peer.enrol(bound, newKey(), identity)).rejects.toMatchObject({ code: "join-token-refused" });
    session.close();
  });

  test("a bound token does not open another server", async () => {
    const all = await token({ autoApprove: true });
    const a = await peer.join(all, { serial: "SN-BOUND-A" });
    await peer.join(all, { serial: "SN-BOUND-B" });
    const bound = await token({ serverId: a.serverId, maxUses: 1 });
    await expect(peer.enrol(bound, newKey(), { serial: "SN-BOUND-B" })).rejects.toMatchObject({
      code: "join-token-refused",
    });
    expect(await uses(bound)).toBe(0);
  });

  test("an identity that matches two servers waits for an operator", async () => {
    const all = await token({ autoApprove: true });
    await peer.join(all, { serial: "SN-AMB-A" });
    await peer.join(all, { macAddresses: ["52:54:00:bb:00:01"] });
    const both = await peer.enrol(all, newKey(), { serial: "SN-AMB-A", macAddresses: ["52:54:00:bb:00:01"] });
    expect(both.certificateDer).toHaveLength(0);
    expect(both.message).toContain("several servers");
  });

  test("hosts that come at the same moment with one identity are one server", async () => {
    const secret = await token();
    const answers = await Promise.all(
      Array.from({ length: 6 }, () => peer.enrol(secret, newKey(), { serial: "SN-RACE" })),
    );
    expect(new Set(answers.map((answer) => answer.serverId)).size).toBe(1);
  });

  test("control characters and oversize fields change nothing or are cleaned", async () => {
    const secret = await token({ autoApprove: true });
    const joined = await peer.join(secret, { hostname: "evil\u001b[2J\nname", product: "a\u0000b" });
    const [row] = await database.sql<
      { name: string }[]
    >`select name from servers where id = ${joined.serverId}`;
    expect(row?.name).toMatch(/^[a-z0-9.-]+$/);
    await expect(peer.enrol(secret, newKey(), { bmcMac: "x".repeat(1000) })).rejects.toMatchObject({
      code: "identity-invalid",
    });
    await expect(peer.enrol(secret, newKey(), { hostname: "x".repeat(100_000) })).rejects.toMatchObject({
      code: "grpc-resource-exhausted",
    });
  });
});

describe("certificates", () => {
  test("one that expired a month ago renews with the same key", async () => {
    const joined = await peer.join(await token({ autoApprove: true }));
    let now = Date.now() - 31 * 86_400_000;
    const past = testDependencies(database.sql, { clock: { ...deps.clock, now: () => now } });
    const { createEnrolmentService } = await import("./service.ts");
    const service = await createEnrolmentService(past, { disconnect: () => undefined });
    const { createSigningRequest } = await import("@palebluedot/shared/pkcs10.ts");
    const old = await service.renew({
      certificateDer: joined.certificateDer,
      csrDer: createSigningRequest(joined.key),
    });
    expect(old.notAfter.getTime()).toBeLessThan(Date.now() - 29 * 86_400_000);
    now = Date.now();
    await past.close();

    const expired = new TestSession({ ...joined, certificateDer: old.der });
    await eventually(() => expired.ended || undefined);
    expect(listeners.registry.isConnected(joined.serverId)).toBe(false);
    expired.close();

    const renewed = await peer.renew(old.der, joined.key);
    const session = new TestSession({ ...joined, certificateDer: renewed.certificateDer });
    expect((await session.answer("welcome")).serverId).toBe(joined.serverId);
    session.close();
  });

  test("renewal needs the certificate's own key, and a certificate of ours", async () => {
    const secret = await token({ autoApprove: true });
    const joined = await peer.join(secret);
    await expect(peer.renew(joined.certificateDer, newKey())).rejects.toMatchObject({
      code: "certificate-unknown",
    });
    const { generateAuthority, issueAgentCertificate } = await import("./certificates.ts");
    const foreign = await issueAgentCertificate(
      await generateAuthority(),
      {
        serverId: joined.serverId,
        publicKeySpki: new X509Certificate(joined.certificateDer).publicKey.export({
          type: "spki",
          format: "der",
        }),
      },
      Date.now(),
      3_600_000,
    );
    await expect(peer.renew(foreign.der, joined.key)).rejects.toMatchObject({ code: "certificate-unknown" });
  });

  test("revocation ends the session at once, and the key is worthless afterwards", async () => {
    const secret = await token({ autoApprove: true });
    const joined = await peer.join(secret, { serial: "SN-REVOKE" });
    const session = new TestSession(joined);
    await session.answer("welcome");
    expect(await listeners.enrolment.revokeCertificates(joined.serverId, "stolen", operator)).toBe(1);
    expect((await session.answer("goodbye")).reason).toBe(2);
    await eventually(() => session.ended || undefined);
    session.close();

    const again = new TestSession(joined);
    expect((await again.answer("goodbye")).reason).toBe(2);
    again.close();
    await expect(peer.renew(joined.certificateDer, joined.key)).rejects.toMatchObject({
      code: "certificate-revoked",
    });
    await expect(peer.enrol(secret, joined.key, { serial: "SN-REVOKE" })).rejects.toMatchObject({
      code: "key-revoked",
    });
  });

  test("an agent's certificate cannot pose as a controller", async () => {
    const joined = await peer.join(await token({ autoApprove: true }));
    expect(new X509Certificate(joined.certificateDer).keyUsage).toEqual(["1.3.6.1.5.5.7.3.2"]);
  });

  test("replicas that start together agree on one authority", async () => {
    const { ensureAuthorities } = await import("./authority.ts");
    const fresh = await createTestDatabase();
    const made = await Promise.all(
      Array.from({ length: 4 }, () => ensureAuthorities({ sql: fresh.sql, secrets: deps.secrets })),
    );
    expect(new Set(made.map(([first]) => first.fingerprint)).size).toBe(1);
    await fresh.close();
  });
});
