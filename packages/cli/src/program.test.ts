import { chmod, readFile, stat, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { describe, expect, test } from "vitest";
import { commands } from "./registry.ts";
import { api, directory, run, withoutUrl, addServers } from "./testing-stand.ts";

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
