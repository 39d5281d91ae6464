import { writeFile } from "node:fs/promises";
import { join } from "node:path";
import { describe, expect, test } from "vitest";
import { api, directory, run } from "./testing-stand.ts";

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
