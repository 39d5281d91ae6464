import { existsSync, readFileSync, readdirSync } from "node:fs";
import { request } from "node:http";
import { join } from "node:path";
import { execa } from "execa";
import { afterEach, beforeEach, describe, expect, test } from "vitest";
import { testServer, type TestServer } from "../nvidia-smi/testing.ts";
import { startEngine, type SimulatedEngine } from "./engine.ts";

let server: TestServer;
let engine: SimulatedEngine;
let socketPath: string;

beforeEach(async () => {
  server = testServer({ speed: 50 });
  socketPath = join(server.stateDir, "engine.sock");
  engine = await startEngine({ stateDir: server.stateDir, socketPath });
});
afterEach(async () => {
  await engine.destroy();
  server[Symbol.dispose]();
});

interface Answer {
  readonly status: number;
  readonly headers: Readonly<Record<string, unknown>>;
  readonly bytes: Buffer;
  readonly json: () => Record<string, unknown>;
}

/** One call; `onData` sees chunks as they come and may end the call by the function it is given. */
function call(
  method: string,
  path: string,
  body?: unknown,
  onData?: (chunk: Buffer, end: () => void) => void,
  headers: Record<string, string> = {},
): Promise<Answer> {
  return new Promise((resolve, reject) => {
    const outgoing = request(
      { socketPath, method, path, agent: false, headers: { "Content-Type": "application/json", ...headers } },
      (response) => {
        const chunks: Buffer[] = [];
        const finish = (): void => {
          const bytes = Buffer.concat(chunks);
          resolve({
            status: response.statusCode ?? 0,
            headers: response.headers,
            bytes,
            json: () => JSON.parse(bytes.toString("utf8")) as Record<string, unknown>,
          });
        };
        response.on("data", (chunk: Buffer) => {
          chunks.push(chunk);
          onData?.(chunk, () => {
            finish();
            outgoing.destroy();
          });
        });
        response.on("end", finish);
        response.on("error", () => undefined);
      },
    );
    outgoing.on("error", reject);
    outgoing.end(body === undefined ? undefined : JSON.stringify(body));
  });
}

async function until<T>(look: () => Promise<T>, holds: (value: T) => boolean): Promise<T> {
  const deadline = Date.now() + 10_000;
  for (;;) {
    const value = await look();
    if (holds(value)) return value;
    if (Date.now() > deadline) throw new Error(`never held; last: ${JSON.stringify(value)}`);
    await new Promise((resolve) => setTimeout(resolve, 20));
  }
}

async function create(body: Record<string, unknown>, name = ""): Promise<string> {
  const answer = await call("POST", `/v1.43/containers/create?name=${name}`, {
    Image: "sim/ticker",
    ...body,
  });
  expect(answer.bytes.toString("utf8")).toContain('"Id"');
  expect(answer.status).toBe(201);
  return answer.json()["Id"] as string;
}

async function run(body: Record<string, unknown>, name = ""): Promise<string> {
  const id = await create(body, name);
  expect((await call("POST", `/containers/${id}/start`)).status).toBe(204);
  return id;
}

interface Inspection {
  readonly State: {
    readonly Status: string;
    readonly Running: boolean;
    readonly Pid: number;
    readonly ExitCode: number;
    readonly OOMKilled: boolean;
    readonly StartedAt: string;
  };
  readonly RestartCount: number;
  readonly Config: { readonly Env: string[]; readonly Labels: Record<string, string> };
  readonly NetworkSettings: { readonly Ports: Record<string, unknown> };
}
const inspect = async (id: string): Promise<Inspection> =>
  (await call("GET", `/containers/${id}/json`)).json() as unknown as Inspection;

const ended = (id: string): Promise<Inspection> =>
  until(
    () => inspect(id),
    (found) => found.State.Status === "exited",
  );

/** Takes the multiplexed stream apart. */
function frames(bytes: Buffer): { stream: number; text: string }[] {
  const found: { stream: number; text: string }[] = [];
  for (let at = 0; at < bytes.length;) {
    const length = bytes.readUInt32BE(at + 4);
    found.push({ stream: bytes[at] ?? 0, text: bytes.subarray(at + 8, at + 8 + length).toString("utf8") });
    at += 8 + length;
  }
  return found;
}

const sh = (script: string): Record<string, unknown> => ({ Cmd: ["sh", "-c", script] });

const filter = (value: unknown): string => `filters=${encodeURIComponent(JSON.stringify(value))}`;

const uuid = (index: number): string => server.gpus[index]?.uuid ?? "";

const gpuPids = async (): Promise<string[]> => {
  const { out } = await server.smi("--query-compute-apps=gpu_uuid,pid", "--format=csv,noheader");
  return out.split("\n").filter((line) => line !== "");
};

describe("engine", () => {
  test("names itself a simulation", async () => {
    const ping = await call("GET", "/_ping");
    expect([ping.status, ping.bytes.toString("utf8"), ping.headers["api-version"]]).toEqual([
      200,
      "OK",
      "1.48",
    ]);
    expect((await call("HEAD", "/_ping")).status).toBe(200);
    const version = (await call("GET", "/v1.41/version")).json();
    expect(version["Platform"]).toEqual({ Name: "palebluedot-simulated-engine" });
    const info = (await call("GET", "/info")).json();
    expect(info["ServerVersion"]).toContain("palebluedot-simulated-engine");
    expect(readdirSync((info["CDISpecDirs"] as string[])[0] ?? "")).toEqual(["nvidia.json"]);
    expect((await call("GET", "/no/such/thing")).status).toBe(404);
  });

  test("refuses a second engine on its socket, and takes over one left by a killed engine", async () => {
    await expect(startEngine({ stateDir: server.stateDir, socketPath })).rejects.toMatchObject({
      code: "simulated-engine-running",
    });
    const elsewhere = join(server.stateDir, "elsewhere.sock");
    await expect(startEngine({ stateDir: server.stateDir, socketPath: elsewhere })).rejects.toMatchObject({
      code: "simulated-engine-running",
    });
    using second = testServer();
    const other = join(second.stateDir, "other.sock");
    const main = new URL("../main.ts", import.meta.url).pathname;
    const args = [main, "engine", "--state", second.stateDir, "--socket", other];
    const child = execa(process.execPath, args, { reject: false });
    await until(
      async () => existsSync(other),
      (there) => there,
    );
    child.kill("SIGKILL");
    await child;
    expect(existsSync(other)).toBe(true);
    const next = await startEngine({ stateDir: second.stateDir, socketPath: other });
    await next.stop();
    expect(existsSync(other)).toBe(false);
  });
});

describe("images", () => {
  test("are pulled with progress, and then there", async () => {
    expect((await call("GET", "/images/registry.example:5000/a/b:1/json")).status).toBe(404);
    const missing = await call("POST", "/containers/create", { Image: "registry.example:5000/a/b:1" });
    expect([missing.status, missing.json()]).toEqual([
      404,
      { message: "No such image: registry.example:5000/a/b:1" },
    ]);
    const pull = await call("POST", "/images/create?fromImage=registry.example:5000/a/b&tag=1");
    const lines = pull.bytes
      .toString("utf8")
      .trim()
      .split("\r\n")
      .map((line) => JSON.parse(line) as Record<string, unknown>);
    expect(
      lines.some((line) => line["status"] === "Downloading" && line["progressDetail"] !== undefined),
    ).toBe(true);
    expect(lines.at(-1)?.["status"]).toBe("Status: Downloaded newer image for registry.example:5000/a/b:1");
    expect((await call("GET", "/images/registry.example:5000/a/b:1/json")).json()["RepoTags"]).toEqual([
      "registry.example:5000/a/b:1",
    ]);
    expect((await call("GET", "/images/docker.io/sim/burn/json")).status).toBe(200);
  });

  test("fail to be pulled as real ones do", async () => {
    const missing = await call("POST", "/images/create?fromImage=sim/missing&tag=latest");
    expect(missing.status).toBe(404);
    expect(missing.json()["message"]).toContain("pull access denied");
    const refused = await call("POST", "/images/create?fromImage=sim/private");
    expect([refused.status, String(refused.json()["message"]).includes("unauthorized")]).toEqual([500, true]);
    expect(
      (
        await call("POST", "/images/create?fromImage=sim/private", undefined, undefined, {
          "X-Registry-Auth": "e30=",
        })
      ).status,
    ).toBe(200);
    const broken = await call("POST", "/images/create?fromImage=sim/broken");
    expect(broken.status).toBe(200);
    expect(broken.bytes.toString("utf8")).toContain('"error":"unexpected EOF"');
    expect((await call("GET", "/images/sim/broken/json")).status).toBe(404);
  });
});

describe("containers", () => {
  test.each([
    [["sleep", "0"], 0],
    [["true"], 0],
    [["false"], 1],
    [["sh", "-c", "echo one; exit 7"], 7],
    [["/bin/sh", "-c", "sleep 0.05 && false"], 1],
  ])("%j exits %i", async (command, code) => {
    const id = await create({ Cmd: command });
    const waiting = call("POST", `/containers/${id}/wait?condition=next-exit`);
    await call("POST", `/containers/${id}/start`);
    expect((await waiting).json()).toEqual({ StatusCode: code });
    const { State } = await inspect(id);
    expect([State.Status, State.ExitCode, State.Pid]).toEqual(["exited", code, 0]);
  });

  test("nothing of an image or a command is executed", async () => {
    const mark = join(server.stateDir, "executed");
    const id = await run(sh(`touch ${mark}; echo $(touch ${mark})`));
    await until(
      async () => (await call("GET", `/containers/${id}/logs?stdout=1`)).bytes.toString("utf8"),
      (log) => log.includes("nothing of the image is executed"),
    );
    const echoed = await run(sh("echo `touch x`; echo $(id)"));
    await ended(echoed);
    expect(
      frames((await call("GET", `/containers/${echoed}/logs?stdout=1`)).bytes)
        .map((frame) => frame.text)
        .join(""),
    ).not.toContain("uid=");
    expect(existsSync(mark)).toBe(false);
  });

  test("conflicts and missing ones are told as the real engine does", async () => {
    const id = await run({}, "first");
    const conflict = await call("POST", "/containers/create?name=first", { Image: "sim/ticker" });
    expect([
      conflict.status,
      String(conflict.json()["message"]).startsWith(
        'Conflict. The container name "/first" is already in use',
      ),
    ]).toEqual([409, true]);
    expect((await call("POST", `/containers/${id}/start`)).status).toBe(304);
    const remove = await call("DELETE", `/containers/${id}`);
    expect([remove.status, String(remove.json()["message"]).includes("container is running")]).toEqual([
      409,
      true,
    ]);
    expect((await call("POST", `/containers/${id}/stop?t=5`)).status).toBe(204);
    expect((await call("POST", `/containers/${id}/stop`)).status).toBe(304);
    expect((await call("POST", `/containers/${id}/kill`)).status).toBe(409);
    expect((await call("DELETE", `/containers/${id}`)).status).toBe(204);
    const gone = await call("GET", `/containers/${id}/json`);
    expect([gone.status, gone.json()]).toEqual([404, { message: `No such container: ${id}` }]);
    expect((await call("POST", "/containers/create", { Image: 5 })).status).toBe(400);
    expect((await call("POST", "/containers/create?name=-bad", { Image: "sim/ticker" })).status).toBe(400);
    const bind = await call("POST", "/containers/create", {
      Image: "sim/ticker",
      HostConfig: { Mounts: [{ Type: "bind", Source: "/no/such/path", Target: "/x" }] },
    });
    expect([bind.status, String(bind.json()["message"]).includes("bind source path does not exist")]).toEqual(
      [400, true],
    );
  });

  test("are listed by label and state", async () => {
    const a = await run({ Labels: { app: "a", team: "x" } });
    const b = await create({ Labels: { app: "b", team: "x" } });
    const ids = async (query: string): Promise<string[]> =>
      ((await call("GET", `/containers/json?${query}`)).json() as unknown as { Id: string }[]).map(
        (row) => row.Id,
      );
    expect(await ids("")).toEqual([a]);
    expect(await ids(`all=1&${filter({ label: ["team=x"] })}`)).toEqual([b, a]);
    expect(await ids(`all=true&${filter({ label: ["app=b", "team"] })}`)).toEqual([b]);
    expect(await ids(filter({ status: ["created"] }))).toEqual([b]);
    expect((await call("GET", "/containers/json?filters=nonsense")).status).toBe(400);
  });

  test("SIGTERM has its grace, then SIGKILL; an OOM kill is told", async () => {
    const id = await run({ Env: ["SIM_IGNORE_SIGTERM=1"] });
    await until(
      async () => (await call("GET", `/containers/${id}/logs?stdout=1`)).bytes.length,
      (size) => size > 0,
    );
    expect((await call("POST", `/containers/${id}/stop?t=1`)).status).toBe(204);
    expect((await inspect(id)).State.ExitCode).toBe(137);
    const oom = await run({ Env: ["SIM_OOM_AFTER=0.1"] });
    expect((await ended(oom)).State).toMatchObject({ ExitCode: 137, OOMKilled: true });
  });

  test("restart policies apply, and a stop ends them", async () => {
    const limited = await run({
      ...sh("exit 2"),
      HostConfig: { RestartPolicy: { Name: "on-failure", MaximumRetryCount: 2 } },
    });
    expect(await ended(limited)).toMatchObject({ RestartCount: 2, State: { ExitCode: 2 } });
    const always = await run({ ...sh("sleep 0.05"), HostConfig: { RestartPolicy: { Name: "always" } } });
    await until(
      () => inspect(always),
      (found) => found.RestartCount >= 2,
    );
    await call("POST", `/containers/${always}/stop?t=1`);
    expect((await inspect(always)).State.Running).toBe(false);
  });

  test("logs: both streams framed, tail, time stamps, and follow to the end", async () => {
    const id = await run(sh("echo one; echo two >&2; sleep 0.4; echo three"));
    const follow = call("GET", `/containers/${id}/logs?stdout=1&stderr=1&follow=1`);
    expect(frames((await follow).bytes)).toEqual([
      { stream: 1, text: "one\n" },
      { stream: 2, text: "two\n" },
      { stream: 1, text: "three\n" },
    ]);
    const tail = await call("GET", `/containers/${id}/logs?stdout=1&tail=1&timestamps=1`);
    expect(frames(tail.bytes).map((frame) => frame.text)).toEqual([
      expect.stringMatching(/^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{9}Z three\n$/),
    ]);
    const late = await call(
      "GET",
      `/containers/${id}/logs?stdout=1&since=${Math.ceil(Date.now() / 1000) + 10}`,
    );
    expect(late.bytes.length).toBe(0);
    expect((await call("GET", `/containers/${id}/logs`)).status).toBe(400);
  });

  test("ports are given out, and not twice", async () => {
    const ports = { "80/tcp": [{ HostPort: "" }] };
    const first = await inspect(await run({ HostConfig: { PortBindings: ports } }));
    const second = await inspect(await run({ HostConfig: { PortBindings: ports } }));
    expect(first.NetworkSettings.Ports).not.toEqual(second.NetworkSettings.Ports);
    const taken = (first.NetworkSettings.Ports["80/tcp"] as { HostPort: string }[])[0]?.HostPort;
    const refused = await call("POST", "/containers/create", {
      Image: "sim/ticker",
      HostConfig: { PortBindings: { "80/tcp": [{ HostPort: taken }] } },
    });
    expect([refused.status, String(refused.json()["message"]).includes("port is already allocated")]).toEqual(
      [500, true],
    );
  });

  test("events tell of a life in order", async () => {
    const seen: Record<string, unknown>[] = [];
    const filter = encodeURIComponent(JSON.stringify({ type: ["container"], label: ["watched=yes"] }));
    const events = call("GET", `/events?filters=${filter}`, undefined, (chunk, end) => {
      for (const line of chunk.toString("utf8").trim().split("\n"))
        seen.push(JSON.parse(line) as Record<string, unknown>);
      if (seen.some((event) => event["Action"] === "destroy")) end();
    });
    await run({ Labels: { watched: "no" } });
    const id = await run({ ...sh("exit 4"), Labels: { watched: "yes" } });
    await ended(id);
    await call("DELETE", `/containers/${id}`);
    await events;
    expect(seen.map((event) => event["Action"])).toEqual(["create", "start", "die", "destroy"]);
    expect(seen[2]?.["Actor"]).toMatchObject({ ID: id, Attributes: { exitCode: "4", watched: "yes" } });
  });
});

const utilization = async (): Promise<number[]> =>
  (await server.smi("--query-gpu=utilization.gpu", "--format=csv,noheader,nounits")).out
    .trim()
    .split("\n")
    .map(Number);

describe("GPUs", () => {
  test.each<[string, () => Record<string, unknown>]>([
    [
      "CDI",
      () => ({
        HostConfig: { DeviceRequests: [{ Driver: "cdi", DeviceIDs: [`nvidia.com/gpu=${uuid(1)}`] }] },
      }),
    ],
    [
      "the NVIDIA runtime",
      () => ({ HostConfig: { DeviceRequests: [{ Capabilities: [["gpu"]], DeviceIDs: [uuid(1)] }] } }),
    ],
    [
      "device nodes",
      () => ({ HostConfig: { Devices: [{ PathOnHost: "/dev/nvidia1" }, { PathOnHost: "/dev/nvidiactl" }] } }),
    ],
    ["the label", () => ({ Labels: { "palebluedot.gpus": uuid(1) } })],
  ])("by %s: load moves on that GPU alone, and is gone after", async (_, body) => {
    const id = await run({ Image: "sim/burn", ...body() });
    const { Pid } = (await inspect(id)).State;
    expect(await gpuPids()).toEqual([`${uuid(1)}, ${Pid}`]);
    await until(utilization, ([other, given = 0]) => other === 0 && given > 80);
    await call("POST", `/containers/${id}/stop?t=5`);
    expect(await gpuPids()).toEqual([]);
    await until(utilization, ([other, given]) => other === 0 && given === 0);
  });

  test("a container without GPUs has none, and one it cannot have is refused", async () => {
    const id = await run({ Image: "sim/all-gpus", Cmd: ["nvidia-smi"] });
    expect((await ended(id)).State.ExitCode).toBe(6);
    expect(await gpuPids()).toEqual([]);
    const cdi = await call("POST", "/containers/create", {
      Image: "sim/burn",
      HostConfig: { DeviceRequests: [{ Driver: "cdi", DeviceIDs: ["nvidia.com/gpu=GPU-nope"] }] },
    });
    expect([cdi.status, String(cdi.json()["message"]).includes("unresolvable CDI devices")]).toEqual([
      500,
      true,
    ]);
    const node = await call("POST", "/containers/create", {
      Image: "sim/burn",
      HostConfig: { Devices: [{ PathOnHost: "/dev/nvidia7" }] },
    });
    expect(node.status).toBe(500);
  });

  test("a stuck process holds its GPU after the container is gone", async () => {
    const id = await run({ Labels: { "palebluedot.gpus": uuid(0) }, Env: ["SIM_GPU_STUCK=1"] });
    await call("DELETE", `/containers/${id}?force=1`);
    expect(await gpuPids()).toHaveLength(1);
  });
});

describe("restart of the engine", () => {
  test("containers run on and are adopted; what ended meanwhile is noticed; policies apply", async () => {
    const running = await run({
      Image: "sim/burn",
      Labels: { "palebluedot.gpus": server.gpus[0]?.uuid ?? "" },
    });
    const ending = await run(sh("sleep 0.3; exit 5"));
    const before = (await inspect(running)).State;
    const endingPid = (await inspect(ending)).State.Pid;
    await engine.stop();
    expect(await gpuPids()).toHaveLength(1);
    await until(
      async () =>
        existsSync(`/proc/${endingPid}`) &&
        !/\nState:\s+Z/.test(readFileSync(`/proc/${endingPid}/status`, "utf8")),
      (alive) => !alive,
    );
    engine = await startEngine({ stateDir: server.stateDir, socketPath });
    expect((await inspect(running)).State).toEqual(before);
    expect((await inspect(ending)).State).toMatchObject({ Status: "exited", ExitCode: 5 });
    // An adopted container is watched as its own children are.
    process.kill(before.Pid, "SIGKILL");
    expect((await ended(running)).State.ExitCode).toBe(137);
    expect(await gpuPids()).toEqual([]);
  });

  test("volumes and pulled images are still there", async () => {
    expect((await call("POST", "/volumes/create", { Name: "data", Labels: { a: "b" } })).status).toBe(201);
    await call("POST", "/images/create?fromImage=some/thing&tag=2");
    await engine.stop();
    engine = await startEngine({ stateDir: server.stateDir, socketPath });
    expect((await call("GET", "/volumes/data")).json()["Labels"]).toEqual({ a: "b" });
    expect((await call("GET", "/images/some/thing:2/json")).status).toBe(200);
    const user = await run({ HostConfig: { Mounts: [{ Type: "volume", Source: "data", Target: "/data" }] } });
    expect((await call("DELETE", "/volumes/data")).status).toBe(409);
    await call("DELETE", `/containers/${user}?force=true`);
    expect((await call("DELETE", "/volumes/data")).status).toBe(204);
    expect((await call("GET", "/volumes/data")).status).toBe(404);
    expect(
      ((await call("GET", "/networks")).json() as unknown as { Name: string }[]).map(
        (network) => network.Name,
      ),
    ).toEqual(["bridge", "host", "none"]);
  });
});
