import { chmod, mkdtemp, readFile, rm, stat, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterEach, beforeEach, describe, expect, test } from "vitest";
import { runProgram, type ProgramIo } from "./program.ts";
import { commands } from "./registry.ts";
import { startFakeApi, type FakeApi } from "./testing-api.ts";

let api: FakeApi;
let directory: string;
let interrupt: AbortController;

beforeEach(async () => {
  api = await startFakeApi();
  directory = await mkdtemp(join(tmpdir(), "pbd-test-"));
  interrupt = new AbortController();
});
afterEach(async () => {
  interrupt.abort();
  await api.close();
  await rm(directory, { recursive: true, force: true });
});

interface Run {
  readonly code: number;
  readonly out: string;
  readonly err: string;
}

interface Started extends Promise<Run> {
  /** What was printed so far. */
  readonly text: { out: string; err: string };
}

const decode = (chunk: string | Uint8Array): string =>
  typeof chunk === "string" ? chunk : Buffer.from(chunk).toString("utf8");

function start(argv: readonly string[], io: Partial<ProgramIo> = {}): Started {
  const text = { out: "", err: "" };
  const running = runProgram(argv, {
    stdout: { write: (chunk) => void (text.out += decode(chunk)) },
    stderr: { write: (chunk) => void (text.err += decode(chunk)) },
    env: {
      PALEBLUEDOT_CLI_CONFIG: join(directory, "sub", "config.json"),
      PALEBLUEDOT_URL: api.url,
      PALEBLUEDOT_TOKEN: api.token,
    },
    readInput: () => Promise.resolve(""),
    promptHidden: undefined,
    signal: interrupt.signal,
    sleep: (ms) => new Promise((resolve) => setTimeout(resolve, Math.min(ms, 10))),
    ...io,
  }).then((code) => ({ code, ...text }));
  return Object.assign(running, { text });
}

const run = (argv: readonly string[], io: Partial<ProgramIo> = {}): Promise<Run> => start(argv, io);
const withoutUrl = (): ProgramIo["env"] => ({
  PALEBLUEDOT_CLI_CONFIG: join(directory, "sub", "config.json"),
});

function addServers(count: number): void {
  for (let index = 0; index < count; index += 1) {
    api.servers.push({
      id: `01890a5d-ac96-774b-bcce-${String(index).padStart(12, "0")}`,
      name: `gpu-${index}`,
      state: "available",
      connected: true,
      gpu_count: 8,
      gpu_models: ["NVIDIA H100 80GB HBM3"],
    });
  }
}

describe("login", () => {
  test("keeps the token in a private file, from standard input, and the next command uses it", async () => {
    const first = await run(["login", api.url, "--name", "lab"], {
      env: withoutUrl(),
      readInput: () => Promise.resolve(`${api.token}\n`),
    });
    expect(first).toMatchObject({ code: 0, out: "" });
    expect(first.err).toContain("as admin");
    const path = join(directory, "sub", "config.json");
    expect((await stat(path)).mode & 0o777).toBe(0o600);
    expect((await stat(join(directory, "sub"))).mode & 0o777).toBe(0o700);
    // A wide mode is narrowed before the file is used.
    await chmod(path, 0o644);
    expect(await run(["servers", "list", "-o", "json"], { env: withoutUrl() })).toMatchObject({
      code: 0,
      out: '{\n  "items": []\n}\n',
    });
    expect((await stat(path)).mode & 0o777).toBe(0o600);
    const list = await run(["context", "list"], { env: withoutUrl() });
    expect(list.out).toMatch(/\* +lab +http/);
    expect(list.out).not.toContain(api.token);
  });

  test("takes the token from a file or a hidden prompt", async () => {
    const tokenFile = join(directory, "token");
    await writeFile(tokenFile, `${api.token}\n`);
    expect(await run(["login", api.url, "--token-file", tokenFile], { env: withoutUrl() })).toMatchObject({
      code: 0,
    });
    const prompted = await run(["login", api.url, "--name", "two"], {
      env: withoutUrl(),
      promptHidden: () => Promise.resolve(api.token),
    });
    expect(prompted).toMatchObject({ code: 0 });
    expect((await run(["context", "use", "nobody"], { env: withoutUrl() })).code).toBe(3);
    expect((await run(["context", "use", "two"], { env: withoutUrl() })).code).toBe(0);
    expect(JSON.parse(await readFile(join(directory, "sub", "config.json"), "utf8"))).toMatchObject({
      current: "two",
    });
  });

  test.each([
    ["a token that the controller refuses", ["login", "URL"], "wrong", 4, "token-invalid"],
    ["no token", ["login", "URL"], "", 2, "token-invalid"],
    ["no address", ["login", "ftp://x"], "t", 2, "usage"],
    ["plain HTTP to another host", ["login", "http://gpu.example:1"], "t", 2, "plain-http-refused"],
    ["credentials in the address", ["login", "http://a:b@127.0.0.1:1"], "t", 2, "url-invalid"],
    [
      "a missing token file",
      ["login", "URL", "--token-file", "/nonexistent"],
      "",
      2,
      "token-file-unreadable",
    ],
    ["a port where nobody listens", ["login", "http://127.0.0.1:1"], "t", 6, "controller-unreachable"],
  ])("%s is refused and nothing is kept", async (_name, argv, token, code, error) => {
    const result = await run(
      argv.map((word) => (word === "URL" ? api.url : word)),
      {
        env: withoutUrl(),
        readInput: () => Promise.resolve(token),
      },
    );
    expect(result).toMatchObject({ code, out: "" });
    expect(result.err).toContain(`[${error}]`);
    await expect(stat(join(directory, "sub", "config.json"))).rejects.toThrow("ENOENT");
  });

  test("without a context the hint says what to do", async () => {
    const result = await run(["servers", "list"], { env: withoutUrl() });
    expect(result.code).toBe(4);
    expect(result.err).toContain("pbd login");
  });
});

describe("lists", () => {
  test("go through all pages, bounded by --limit", async () => {
    addServers(7);
    api.pageItems = 3;
    const all = await run(["servers", "list", "-o", "json"]);
    expect((JSON.parse(all.out) as { items: unknown[] }).items).toHaveLength(7);
    const some = await run(["servers", "list", "--limit", "4"]);
    expect(some.out.trim().split("\n")).toHaveLength(5);
    expect(some.out).toMatch(/^NAME +STATE +AGENT +GPUS/);
  });

  test("text of others cannot move the cursor", async () => {
    addServers(1);
    Object.assign(api.servers[0] ?? {}, { name: "evil\u001b[2J\r\nname" });
    const { out } = await run(["servers", "list"]);
    expect(out).not.toContain("\u001b");
    expect(out.trim().split("\n")).toHaveLength(2);
  });

  test("something is found by name or by id", async () => {
    addServers(12);
    expect((await run(["servers", "show", "gpu-1"])).out).toMatch(/name: +gpu-1\n/);
    expect((await run(["servers", "show", "01890A5D-ac96-774b-bcce-000000000002"])).out).toMatch(
      /name: +gpu-2\n/,
    );
    expect(await run(["servers", "show", "gpu"])).toMatchObject({ code: 3 });
    api.servers.push({ ...api.servers[0], id: "01890a5d-ac96-774b-bcce-0000000000ff" });
    const twice = await run(["servers", "approve", "gpu-0"]);
    expect(twice.code).toBe(5);
    expect(twice.err).toContain("server-ambiguous");
  });
});

describe("alloc", () => {
  test("create sends what the flags say, and secrets from a file only", async () => {
    const secrets = join(directory, "secrets");
    await writeFile(secrets, "# comment\nAPI_KEY=a=b c\n\nEMPTY=\n");
    const result = await run([
      "alloc",
      "create",
      "--gpus",
      "2",
      "--model",
      "H100",
      "--memory",
      "80Gi",
      "--image",
      "busybox",
      "--env",
      "A=1",
      "--env",
      "B=x=y",
      "--secret-env-file",
      secrets,
      "--lease",
      "1h30m",
      "--port",
      "8888",
      "--port",
      "9000:53/udp",
      "--label",
      "rack=7",
      "--cpu",
      "1.5",
      "-o",
      "json",
      "--",
      "sh",
      "-c",
      "sleep 1",
    ]);
    expect(result).toMatchObject({ code: 0, err: "" });
    expect(api.writes[0]?.body).toEqual({
      gpus: { count: 2, model: "H100", min_memory_bytes: 80 * 1024 ** 3, labels: { rack: "7" } },
      container: {
        image: "busybox",
        command: ["sh", "-c", "sleep 1"],
        environment: { A: "1", B: "x=y" },
        secret_environment: { API_KEY: "a=b c", EMPTY: "" },
        ports: [
          { container_port: 8888, host_port: 0, protocol: "tcp" },
          { container_port: 53, host_port: 9000, protocol: "udp" },
        ],
        cpu_millicores: 1500,
      },
      lease_seconds: 5400,
    });
  });

  test("create from a file or standard input sends the request as it is", async () => {
    const request = { gpus: { count: 1 }, container: { image: "x" }, lease_seconds: 60 };
    const file = join(directory, "request.json");
    await writeFile(file, JSON.stringify(request));
    expect((await run(["alloc", "create", "-f", file])).code).toBe(0);
    const io = { readInput: () => Promise.resolve(JSON.stringify(request)) };
    expect((await run(["alloc", "create", "-f", "-"], io)).code).toBe(0);
    expect(api.writes.map((write) => write.body)).toEqual([request, request]);
  });

  test("an answer that was lost is asked for again under the same key", async () => {
    api.loseAnswers = 1;
    api.failNext = 1;
    const result = await run(["alloc", "create", "--gpus", "1", "--image", "busybox"]);
    expect(result.code).toBe(0);
    expect(api.allocations.size).toBe(1);
    expect(new Set(api.writes.map((write) => write.headers["idempotency-key"])).size).toBe(1);
    expect(api.writes).toHaveLength(3);
  });

  test("--wait ends when it is active", async () => {
    const result = await run([
      "alloc",
      "create",
      "--gpus",
      "1",
      "--image",
      "busybox",
      "--wait",
      "-o",
      "json",
    ]);
    expect(result.code).toBe(0);
    expect(JSON.parse(result.out)).toMatchObject({ state: "active" });
    expect(result.err).toContain("queued: waiting for a free GPU");
  });

  test("--wait fails with the reason when it ends before", async () => {
    api.nextState = { state: "ended", end_reason: "failed", message: "the image does not exist" };
    const result = await run(["alloc", "create", "--gpus", "1", "--image", "nope", "--wait"]);
    expect(result.code).toBe(1);
    expect(result.err).toContain("the image does not exist [allocation-not-active]");
  });

  test("--wait gives up after its time", async () => {
    api.nextState = { state: "queued", message: "no server has 8 free H100" };
    const result = await run([
      "alloc",
      "create",
      "--gpus",
      "1",
      "--image",
      "x",
      "--wait",
      "--wait-timeout",
      "0s",
    ]);
    expect(result.code).toBe(6);
    expect(result.err).toContain("[wait-timed-out]");
  });

  test.each([
    ["no GPUs", ["--image", "x"]],
    ["a word for a number", ["--gpus", "two", "--image", "x"]],
    ["too many", ["--gpus", "65", "--image", "x"]],
    ["a file and flags", ["-f", "r.json", "--gpus", "1"]],
    ["an assignment without =", ["--gpus", "1", "--image", "x", "--env", "A"]],
    ["a name twice", ["--gpus", "1", "--image", "x", "--env", "A=1", "--env", "A=2"]],
    ["a faulty port", ["--gpus", "1", "--image", "x", "--port", "80/sctp"]],
    ["a faulty duration", ["--gpus", "1", "--image", "x", "--lease", "8 hours"]],
    ["a faulty size", ["--gpus", "1", "--image", "x", "--memory", "lots"]],
    ["an unknown flag", ["--gpus", "1", "--image", "x", "--gpu-model", "y"]],
  ])("%s is wrong usage and asks for nothing", async (_name, argv) => {
    expect(await run(["alloc", "create", ...argv])).toMatchObject({ code: 2, out: "" });
    expect(api.writes).toEqual([]);
  });

  test("a secret's line is not repeated in the error", async () => {
    const secrets = join(directory, "secrets");
    await writeFile(secrets, "hunter2\n");
    const result = await run([
      "alloc",
      "create",
      "--gpus",
      "1",
      "--image",
      "x",
      "--secret-env-file",
      secrets,
    ]);
    expect(result.code).toBe(2);
    expect(result.err).toContain("line 1");
    expect(result.err).not.toContain("hunter2");
  });

  test("what the controller refuses is told with field, code and hint", async () => {
    const result = await run(["alloc", "create", "--gpus", "9", "--image", "x"]);
    expect(result).toMatchObject({ code: 2, out: "" });
    expect(result.err).toContain("/gpus/count: at most 8");
    expect(result.err).toContain("[invalid-request]");
    expect(result.err).toContain("hint: mend invalid-request");
    expect(result.err).toContain("request: req-1");
  });

  test("list, show, logs, extend and release of one by its name", async () => {
    await run(["alloc", "create", "--gpus", "1", "--image", "busybox", "--name", "mine"]);
    expect((await run(["alloc", "list"])).out).toContain("mine");
    expect((await run(["alloc", "show", "mine"])).out).toMatch(/image: +busybox/);
    expect(await run(["alloc", "logs", "-f", "mine"])).toMatchObject({ code: 0, out: "line 1\nline 2\n" });
    expect(JSON.parse((await run(["alloc", "extend", "mine", "2h", "-o", "json"])).out)).toMatchObject({
      lease_seconds: 3600 + 7200,
    });
    api.nextState = { state: "ended" };
    const released = await run(["alloc", "release", "mine", "--wait"]);
    expect(released.code).toBe(0);
    expect(released.out).toMatch(/state: +ended \(released\)/);
    expect((await run(["alloc", "list"])).out).toBe("");
    expect((await run(["alloc", "list", "--all"])).out).toContain("ended (released)");
    // The name is used again: it means the one that lives.
    api.nextState = { state: "active" };
    await run(["alloc", "create", "--gpus", "3", "--image", "busybox", "--name", "mine"]);
    expect((await run(["alloc", "show", "mine"])).out).toMatch(/gpus: +3/);
    const id = [...api.allocations.keys()][0] ?? "";
    expect((await run(["alloc", "extend", id, "1h"])).code).toBe(5);
    expect((await run(["alloc", "show", "01890a5d-ac96-774b-bcce-0000000000ff"])).code).toBe(3);
  });
});

describe("errors", () => {
  test("a moment's outage is waited out, a longer one is exit code 6", async () => {
    api.failNext = 2;
    expect((await run(["servers", "list"])).code).toBe(0);
    api.failNext = 3;
    const result = await run(["servers", "list"]);
    expect(result).toMatchObject({ code: 6, out: "" });
    expect(result.err).toContain("[database-unavailable]");
  });

  test("an answer that is not the controller's", async () => {
    const result = await run(["servers", "list"], {
      env: { ...withoutUrl(), PALEBLUEDOT_URL: `${api.url}/elsewhere`, PALEBLUEDOT_TOKEN: api.token },
    });
    expect(result.code).toBe(3);
  });

  test("a damaged configuration is named, not quoted", async () => {
    await run(["login", api.url], { env: withoutUrl(), readInput: () => Promise.resolve(api.token) });
    await writeFile(join(directory, "sub", "config.json"), `{"contexts": "${api.token}"}`);
    const result = await run(["servers", "list"], { env: withoutUrl() });
    expect(result.code).toBe(2);
    expect(result.err).toContain("[config-invalid]");
    expect(result.err).not.toContain(api.token);
  });
});

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

const event = (seq: number, type = "allocation.active"): Record<string, unknown> => ({
  seq,
  type,
  severity: "info",
  message: `number ${seq}`,
  occurred_at: "2026-01-01T00:00:00.000Z",
});
const numbers = (out: string): number[] =>
  out
    .trim()
    .split("\n")
    .filter((line) => line !== "")
    .map((line) => (JSON.parse(line) as { seq: number }).seq);

describe("events", () => {
  test("the newest come last", async () => {
    for (let seq = 1; seq <= 9; seq += 1)
      api.publish(event(seq, seq % 2 === 0 ? "server.x" : "allocation.y"));
    const result = await run(["events", "-n", "3", "--type", "allocation.", "-o", "json"]);
    const { items } = JSON.parse(result.out) as { items: { seq: number }[] };
    expect(items.map(({ seq }) => seq)).toEqual([5, 7, 9]);
  });

  test("follow goes on after a cut, without gap or duplicate", async () => {
    api.publish(event(1));
    api.publish(event(2));
    const following = start(["events", "-f", "-n", "1", "-o", "json"]);
    await expect.poll(() => api.openStreams()).toBe(1);
    api.publish(event(3));
    await expect.poll(() => numbers(following.text.out)).toEqual([2, 3]);
    api.cutStreams();
    api.publish(event(4));
    api.publish(event(5));
    await expect.poll(() => numbers(following.text.out), { timeout: 10_000 }).toEqual([2, 3, 4, 5]);
    interrupt.abort();
    expect((await following).code).toBe(0);
  });
});

describe("help", () => {
  test("names every command and the exit codes", async () => {
    const help = await run(["--help"]);
    expect(help.code).toBe(0);
    expect(help.out).toContain("Exit codes:");
    for (const { path } of commands) {
      expect(help.out).toContain(path[0]);
      const own = await run([...path, "--help"]);
      expect(own.code).toBe(0);
      expect(own.out).toContain(`Usage: pbd ${path.join(" ")}`);
    }
    expect((await run(["frobnicate"])).code).toBe(2);
    expect((await run([])).code).toBe(2);
  });
});
