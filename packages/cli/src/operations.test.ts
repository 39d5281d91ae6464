import { describe, expect, test } from "vitest";
import { api, run, addServers } from "./testing-stand.ts";

describe("join-token", () => {
  test("create shows the token once and on standard output alone", async () => {
    const result = await run(["join-token", "create", "--uses", "4", "--auto-approve", "--expires-in", "2h"]);
    expect(result.code).toBe(0);
    expect(result.out).toMatch(/token: +pbj_secret\nca fingerprint: +ab12/);
    expect(result.err).not.toContain("pbj_secret");
    expect(api.writes[0]?.body).toMatchObject({ max_uses: 4, auto_approve: true, expires_in_seconds: 7200 });
    expect((await run(["join-token", "list"])).out).toContain("0/4");
  });
});

const lastBody = (): unknown => api.writes.at(-1)?.body;

describe("operating servers, GPUs and tokens", () => {
  const id = "01890a5d-ac96-774b-bcce-000000000000";

  test.each([
    [["servers", "drain", "gpu-0"], `PATCH /api/v1/servers/${id}`, { draining: true }, "is draining"],
    [
      ["servers", "undrain", "gpu-0"],
      `PATCH /api/v1/servers/${id}`,
      { draining: false },
      "allocations again",
    ],
    [
      ["servers", "reject", "gpu-0", "--key", "ab".repeat(32), "--reason", "not ours"],
      `POST /api/v1/servers/${id}/reject`,
      { public_key_sha256: "ab".repeat(32), reason: "not ours" },
      "refused",
    ],
    [
      ["servers", "retire", "gpu-0", "--abandon", "--reason", "burnt"],
      `POST /api/v1/servers/${id}/retire`,
      { reason: "burnt", abandon_allocations: true },
      "gpu-0 is retired",
    ],
    [["servers", "retire", "gpu-0"], `POST /api/v1/servers/${id}/retire`, {}, "gpu-0 is retired"],
    [
      ["servers", "revoke-certificates", "gpu-0", "--reason", "stolen"],
      `POST /api/v1/servers/${id}/revoke-certificates`,
      { reason: "stolen" },
      "2 certificates of gpu-0 revoked",
    ],
    [
      ["gpus", "set", id, "--schedulable", "no", "--reason", "noisy fan"],
      `PATCH /api/v1/gpus/${id}`,
      { scheduling: { schedulable: false, reason: "noisy fan" } },
      "",
    ],
  ])("%j", async (argv, request, body, told) => {
    addServers(1);
    const result = await run(argv);
    expect(result).toMatchObject({ code: 0 });
    expect(result.err).toContain(told);
    expect(`${api.writes[0]?.method} ${api.writes[0]?.path}`).toBe(request);
    expect(lastBody()).toEqual(body);
  });

  test("labels that were not named stay", async () => {
    addServers(1);
    Object.assign(api.servers[0] ?? {}, { labels: { zone: "a", old: "1" } });
    expect((await run(["servers", "set", "gpu-0", "--label", "zone=b", "--unlabel", "old"])).code).toBe(0);
    expect(lastBody()).toEqual({ labels: { zone: "b" } });
    expect((await run(["servers", "set", "gpu-0"])).code).toBe(2);
    expect(api.writes).toHaveLength(1);
  });

  test("a server is registered before its host comes, and who asked to be it is shown", async () => {
    const made = await run(["servers", "register", "gpu-9", "--serial", "S1", "--mac", "02:00:00:00:00:01"]);
    expect(made.out).toMatch(/state: +pending/);
    expect(lastBody()).toEqual({
      name: "gpu-9",
      serial: "S1",
      macs: ["02:00:00:00:00:01"],
      pool: "container",
      labels: {},
    });
    expect((await run(["servers", "enrolments", "gpu-9"])).out).toContain("ab".repeat(32));
  });

  test("a server that is in use is not retired", async () => {
    addServers(1);
    expect((await run(["servers", "retire", "gpu-0", "--abandon"])).code).toBe(2);
    Object.assign(api.servers[0] ?? {}, { gpu_claimed_count: 2 });
    const refused = await run(["servers", "retire", "gpu-0"]);
    expect(refused).toMatchObject({ code: 5, out: "" });
    expect(refused.err).toContain("[server-not-retirable]");
  });

  test("tokens of staff and of a tenant are listed and revoked", async () => {
    const tenant = "01890a5d-ac96-774b-bcce-0000000000aa";
    expect((await run(["tokens", "list"])).out).toContain("staff");
    expect((await run(["tokens", "list", "--tenant", tenant])).out).toContain("of-a-tenant");
    expect((await run(["tokens", "revoke", api.tokenId, "--tenant", tenant])).err).toContain("is revoked");
    expect(api.writes[0]?.path).toBe(`/api/v1/tenants/${tenant}/tokens/${api.tokenId}`);
    expect((await run(["tokens", "revoke", id])).code).toBe(3);
  });
});
