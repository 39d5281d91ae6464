import { afterAll, beforeAll, beforeEach, describe, expect, test } from "vitest";
import type { HardwareIdentity } from "@palebluedot/shared/generated/palebluedot/agent/v1/enrolment.ts";
import { createTestDatabase, type TestDatabase } from "../db/testing.ts";
import { startAgentListeners, type AgentListeners } from "../sessions/listeners.ts";
import {
  MemoryAllocations,
  newKey,
  TestPeer,
  testDependencies,
  TestSession,
  type EnrolledPeer,
} from "../sessions/testing.ts";
import type { NewJoinToken } from "./types.ts";

const operator = { name: "token:test" };
let database: TestDatabase;
let deps: ReturnType<typeof testDependencies>;
let listeners: AgentListeners;
let peer: TestPeer;
let victim: EnrolledPeer;
let victimIdentity: Partial<HardwareIdentity>;
let count = 0;

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

beforeEach(async () => {
  count += 1;
  victimIdentity = { serial: `SN-HELD-${count}`, macAddresses: [`52:54:00:cc:00:0${count % 10}`] };
  // Every test has its own host: what an earlier one left is nobody's rival.
  await database.sql`update servers set state = 'retired'`;
  victim = await peer.join(await token({ autoApprove: true }), victimIdentity);
});

async function token(input: Partial<NewJoinToken> = {}): Promise<string> {
  const made = await listeners.enrolment.createJoinToken({ name: "t", maxUses: 10, ...input }, operator);
  return made.token;
}

/** The victim's key is the only one that speaks for its server, and it still can. */
async function expectUntouched(): Promise<void> {
  const live = await database.sql`
    select distinct public_key_sha256 from certificates where server_id = ${victim.serverId}`;
  expect(live).toHaveLength(1);
  const session = new TestSession(victim);
  expect((await session.answer("welcome")).serverId).toBe(victim.serverId);
  session.close();
  await expect(peer.renew(victim.certificateDer, victim.key)).resolves.toBeDefined();
}

describe("a key that waits for a server that another key holds", () => {
  test.each<[string, () => Partial<HardwareIdentity>]>([
    ["no identity", () => ({})],
    ["another identity", () => ({ serial: `SN-OTHER-${count}` })],
    ["the same identity", () => victimIdentity],
    ["a part of the identity", () => ({ macAddresses: victimIdentity.macAddresses ?? [] })],
  ])("does not get it by a second token that lets unknown hosts in, with %s", async (_name, second) => {
    const key = newKey();
    const waiting = await peer.enrol(await token(), key, victimIdentity);
    expect(waiting.serverId).toBe(victim.serverId);
    const attack = await peer.enrol(await token({ autoApprove: true }), key, second());
    if (attack.certificateDer.length > 0) expect(attack.serverId).not.toBe(victim.serverId);
    await expectUntouched();
    // Nor with a third, whatever it is by now.
    const again = await peer.enrol(await token({ autoApprove: true }), key, victimIdentity);
    if (again.certificateDer.length > 0) expect(again.serverId).not.toBe(victim.serverId);
    await expectUntouched();
  });

  test("gets it by a token bound to the server, and by an operator's approval", async () => {
    const first = newKey();
    await peer.enrol(await token(), first, victimIdentity);
    const bound = await token({ serverId: victim.serverId, maxUses: 1 });
    expect((await peer.join(bound, {}, first)).serverId).toBe(victim.serverId);

    const second = newKey();
    const all = await token();
    await peer.enrol(all, second, victimIdentity);
    await listeners.enrolment.approveServer(victim.serverId, operator);
    expect((await peer.join(all, victimIdentity, second)).serverId).toBe(victim.serverId);
    const rows = await database.sql`
      select approval from enrolment_requests where server_id = ${victim.serverId} order by created_at`;
    expect(rows.map((row) => row["approval"])).toEqual(["auto-approve", "bound-token", "operator"]);
  });

  test("does not get it by an approval from before the key that holds it now", async () => {
    const late = newKey();
    const all = await token();
    await peer.enrol(all, late, victimIdentity);
    await listeners.enrolment.approveServer(victim.serverId, operator);
    const fresh = await peer.join(await token({ serverId: victim.serverId, maxUses: 1 }), victimIdentity);
    const answer = await peer.enrol(all, late, victimIdentity);
    expect(answer.certificateDer).toHaveLength(0);
    expect(answer.message).toContain("another key");
    await expect(peer.renew(fresh.certificateDer, fresh.key)).resolves.toBeDefined();
    // A new word of the operator counts.
    await listeners.enrolment.approveServer(victim.serverId, operator);
    expect((await peer.join(all, victimIdentity, late)).serverId).toBe(victim.serverId);
  });
});

test("a record that an operator wrote is not the placeholder of whoever waits for it", async () => {
  const id = `01900000-0000-7000-8000-00000000010${count % 10}`;
  await database.sql`
    insert into servers (id, name, state, serial) values (${id}, ${`rack-${count}`}, 'pending', 'SN-WRITTEN')`;
  const key = newKey();
  const all = await token();
  await peer.enrol(all, key, { serial: "SN-ELSE" });
  // As if it had come to wait for the record by another request that has gone since.
  await database.sql`
    update enrolment_requests set server_id = ${id}, made_server = false where reason = 'unknown hardware' and state = 'pending'`;
  const answer = await peer.join(await token({ autoApprove: true }), {}, key);
  expect(answer.serverId).not.toBe(id);
});

test("a placeholder that two hosts wait for is neither's by a token alone", async () => {
  const identity = { serial: `SN-TWINS-${count}` };
  const all = await token();
  const [first, second] = [newKey(), newKey()];
  const waiting = await peer.enrol(all, first, identity);
  expect((await peer.enrol(all, second, identity)).serverId).toBe(waiting.serverId);
  expect((await peer.join(await token({ autoApprove: true }), {}, first)).serverId).not.toBe(
    waiting.serverId,
  );
});

test("an unknown host that waited is let in by a second token, as the server it waited as", async () => {
  const key = newKey();
  const waiting = await peer.enrol(await token(), key, {});
  expect(waiting.certificateDer).toHaveLength(0);
  const joined = await peer.join(await token({ autoApprove: true }), {}, key);
  expect(joined.serverId).toBe(waiting.serverId);
});

test("hosts that come as one recorded server at the same moment: one of them holds it", async () => {
  const id = `01900000-0000-7000-8000-00000000020${count % 10}`;
  await database.sql`
    insert into servers (id, name, state, serial) values (${id}, ${`pair-${count}`}, 'pending', ${`SN-PAIR-${count}`})`;
  const mac = `52:54:00:dd:00:0${count % 10}`;
  await database.sql`insert into server_macs (mac, server_id) values (${mac}, ${id})`;
  const all = await token({ autoApprove: true });
  // Different identifiers, so that the two do not take turns.
  const answers = await Promise.all([
    peer.enrol(all, newKey(), { serial: `SN-PAIR-${count}` }),
    peer.enrol(all, newKey(), { macAddresses: [mac] }),
  ]);
  expect(answers.filter((answer) => answer.certificateDer.length > 0)).toHaveLength(1);
  const live = await database.sql`select 1 from certificates where server_id = ${id} and revoked_at is null`;
  expect(live).toHaveLength(1);
});
