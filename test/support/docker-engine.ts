import { execFile, spawn, type ChildProcess } from "node:child_process";
import { once } from "node:events";
import { access, copyFile, mkdir, mkdtemp, open, readFile, rm, symlink, writeFile } from "node:fs/promises";
import http from "node:http";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { promisify } from "node:util";

const run = promisify(execFile);

/** A real Docker Engine for tests. */
export interface TestDockerEngine {
  /** For DOCKER_HOST. */
  readonly dockerHost: string;
  readonly socketPath: string;
  /**
   * Imports an image made of the static busybox of this machine, with its applets under /bin. `env` becomes
   * the image's environment, `labels` its labels. No registry is asked.
   */
  importBusyboxImage(
    name: string,
    options?: {
      readonly env?: Readonly<Record<string, string>>;
      readonly labels?: Readonly<Record<string, string>>;
    },
  ): Promise<void>;
  /** JSON answer of the engine's API; throws with the engine's message on an error status. */
  api(method: "GET" | "POST" | "DELETE", path: string, body?: unknown): Promise<unknown>;
  /** Present when this process owns the daemon: ends it (containers end with it) and starts it again. */
  readonly daemon?: { stop(): Promise<void>; start(): Promise<void> };
  /**
   * Present with the option `bridge`: runs a command inside the engine's network namespace, where its published
   * ports are. Resolves with the standard output; rejects when the command fails or takes more than 20 s.
   */
  readonly inNetwork?: (command: string, args: readonly string[]) => Promise<string>;
  /** Removes what this engine made, and ends it when this process started it. */
  stop(): Promise<void>;
}

export type DockerEngineStart = TestDockerEngine | { readonly unavailable: string };

export const isAvailable = (engine: DockerEngineStart): engine is TestDockerEngine => "api" in engine;

const busyboxPaths = ["/bin/busybox", "/usr/bin/busybox"];

async function firstExisting(paths: readonly string[]): Promise<string | undefined> {
  for (const path of paths) {
    try {
      await access(path);
      return path;
    } catch {
      // The next one.
    }
  }
  return undefined;
}

function request(
  socketPath: string,
  method: string,
  path: string,
  body?: { readonly type: string; readonly content: Buffer },
): Promise<{ readonly status: number; readonly text: string }> {
  return new Promise((resolve, reject) => {
    const outgoing = http.request(
      {
        socketPath,
        method,
        path,
        timeout: 60_000,
        headers: body
          ? { "content-type": body.type, "content-length": String(body.content.length) }
          : { "content-length": "0" },
      },
      (response) => {
        const chunks: Buffer[] = [];
        response.on("data", (chunk: Buffer) => chunks.push(chunk));
        response.on("error", reject);
        response.on("end", () =>
          resolve({ status: response.statusCode ?? 0, text: Buffer.concat(chunks).toString() }),
        );
      },
    );
    outgoing.on("timeout", () => outgoing.destroy(new Error(`${method} ${path}: no answer in 60 s`)));
    outgoing.on("error", reject);
    outgoing.end(body?.content);
  });
}

async function untilAnswers(socketPath: string, alive: () => boolean, logPath: string): Promise<void> {
  const deadline = Date.now() + 60_000;
  for (;;) {
    try {
      if ((await request(socketPath, "GET", "/_ping")).status === 200) return;
    } catch {
      // Not yet.
    }
    if (!alive() || Date.now() > deadline) {
      const log = await readFile(logPath, "utf8").catch(() => "");
      throw new Error(`dockerd did not come up: ${log.slice(-1500)}`);
    }
    await new Promise((resolve) => setTimeout(resolve, 50));
  }
}

async function busyboxTar(): Promise<Buffer> {
  const busybox = await firstExisting(busyboxPaths);
  if (busybox === undefined) throw new Error("no busybox on this machine (Debian: busybox-static)");
  const root = await mkdtemp(join(tmpdir(), "pbd-image-"));
  try {
    for (const dir of ["bin", "tmp", "etc", "root"]) await mkdir(join(root, dir));
    await copyFile(busybox, join(root, "bin", "busybox"));
    const { stdout } = await run(busybox, ["--list"]);
    for (const applet of stdout.split("\n").filter((name) => name !== "" && name !== "busybox")) {
      await symlink("busybox", join(root, "bin", applet));
    }
    const tar = await run("tar", ["-C", root, "-c", "."], {
      encoding: "buffer",
      maxBuffer: 64 * 1024 * 1024,
    });
    return tar.stdout;
  } finally {
    await rm(root, { recursive: true, force: true });
  }
}

function client(
  dockerHost: string,
  socketPath: string,
): Omit<TestDockerEngine, "stop" | "daemon" | "inNetwork"> {
  return {
    dockerHost,
    socketPath,
    async importBusyboxImage(name, options = {}) {
      const query = new URLSearchParams({
        fromSrc: "-",
        repo: name,
        tag: name.includes(":") ? "" : "latest",
      });
      query.append("changes", "ENV PATH=/bin");
      query.append("changes", 'CMD ["/bin/sh"]');
      for (const [key, value] of Object.entries(options.env ?? {}))
        query.append("changes", `ENV ${key}=${value}`);
      for (const [key, value] of Object.entries(options.labels ?? {})) {
        query.append("changes", `LABEL ${key}=${value}`);
      }
      const answer = await request(socketPath, "POST", `/images/create?${query.toString()}`, {
        type: "application/x-tar",
        content: await busyboxTar(),
      });
      if (answer.status !== 200 || answer.text.includes('"error"')) {
        throw new Error(`import of ${name}: ${answer.status} ${answer.text.slice(0, 500)}`);
      }
    },
    async api(method, path, body) {
      const answer = await request(
        socketPath,
        method,
        path,
        body === undefined
          ? undefined
          : { type: "application/json", content: Buffer.from(JSON.stringify(body)) },
      );
      if (answer.status >= 400)
        throw new Error(`${method} ${path}: ${answer.status} ${answer.text.slice(0, 500)}`);
      return answer.text === "" || answer.text === "OK" ? undefined : (JSON.parse(answer.text) as unknown);
    },
  };
}

/** Why no network namespace can be made and entered here; undefined when it can. */
async function withoutNamespaces(): Promise<string | undefined> {
  try {
    await run("unshare", ["--net", "ip", "link", "set", "lo", "up"]);
    await run("nsenter", ["--version"]);
    return undefined;
  } catch (error) {
    return `no network namespaces here (Debian: util-linux, iproute2): ${error instanceof Error ? error.message : String(error)}`;
  }
}

/**
 * The engine named by PALEBLUEDOT_TEST_DOCKER_HOST (unix:// only); else a private dockerd without network
 * set-up, when this process is root and dockerd is installed; else the reason why there is none, and
 * tests skip by name.
 *
 * `bridge`: always a private dockerd, in a network namespace of its own with Docker's default bridge, so that it
 * can publish ports without touching the machine's network.
 */
export async function startDockerEngine(
  options: { readonly bridge?: boolean } = {},
): Promise<DockerEngineStart> {
  const named = options.bridge === true ? undefined : process.env["PALEBLUEDOT_TEST_DOCKER_HOST"];
  if (named !== undefined && named !== "") {
    const socketPath = /^unix:\/\/(\/.+)$/.exec(named)?.[1];
    if (socketPath === undefined) return { unavailable: "PALEBLUEDOT_TEST_DOCKER_HOST is not unix:///path" };
    return { ...client(named, socketPath), stop: () => Promise.resolve() };
  }
  if (process.getuid?.() !== 0) return { unavailable: "not root, and no PALEBLUEDOT_TEST_DOCKER_HOST" };
  const dockerd = await firstExisting(["/usr/sbin/dockerd", "/usr/bin/dockerd", "/usr/local/bin/dockerd"]);
  if (dockerd === undefined) return { unavailable: "dockerd is not installed (Debian: docker.io)" };
  const busybox = await firstExisting(busyboxPaths);
  if (busybox === undefined) return { unavailable: "busybox is not installed (Debian: busybox-static)" };
  if (options.bridge === true) {
    const why = await withoutNamespaces();
    if (why !== undefined) return { unavailable: why };
  }

  // Short: containerd's socket below it must fit into 107 bytes.
  const dir = await mkdtemp("/tmp/pbd-dk-");
  const socketPath = join(dir, "d.sock");
  const logPath = join(dir, "log");
  let daemon: ChildProcess | undefined;

  async function start(): Promise<void> {
    const log = await open(logPath, "a");
    // The userland proxy serves published ports, so that no packet filter is needed either way.
    const inOwnNetwork = ["--net", "sh", "-c", 'ip link set lo up && exec "$0" "$@"', dockerd ?? "dockerd"];
    const child = spawn(
      options.bridge === true ? "unshare" : (dockerd ?? "dockerd"),
      [
        ...(options.bridge === true ? [...inOwnNetwork, "--bip=172.30.0.1/16"] : ["--bridge=none"]),
        "--iptables=false",
        "--ip6tables=false",
        "--host",
        `unix://${socketPath}`,
        "--data-root",
        join(dir, "data"),
        "--exec-root",
        join(dir, "exec"),
        "--pidfile",
        join(dir, "pid"),
        "--config-file",
        join(dir, "daemon.json"),
      ],
      {
        stdio: ["ignore", log.fd, log.fd],
        env: { PATH: "/usr/local/sbin:/usr/sbin:/sbin:/usr/local/bin:/usr/bin:/bin" },
      },
    );
    daemon = child;
    await log.close();
    await untilAnswers(socketPath, () => child.exitCode === null && child.signalCode === null, logPath);
  }

  async function stop(): Promise<void> {
    const child = daemon;
    daemon = undefined;
    if (!child || child.exitCode !== null || child.signalCode !== null) return;
    const closed = once(child, "exit");
    child.kill("SIGTERM");
    const timer = setTimeout(() => child.kill("SIGKILL"), 30_000);
    await closed;
    clearTimeout(timer);
  }

  async function removeDir(): Promise<void> {
    const mounts = await readFile("/proc/self/mounts", "utf8");
    const ours = mounts
      .split("\n")
      .map((line) => line.split(" ")[1] ?? "")
      .filter((path) => path.startsWith(`${dir}/`));
    // Innermost first.
    for (const path of ours.sort((a, b) => b.length - a.length)) {
      await run("umount", ["-l", path]).catch(() => undefined);
    }
    await rm(dir, { recursive: true, force: true, maxRetries: 5, retryDelay: 200 });
  }

  try {
    await writeFile(join(dir, "daemon.json"), "{}");
    await start();
  } catch (error) {
    await stop();
    await removeDir();
    return {
      unavailable: `dockerd does not run here: ${error instanceof Error ? error.message : String(error)}`,
    };
  }
  const engine = client(`unix://${socketPath}`, socketPath);
  return {
    ...engine,
    daemon: { start, stop },
    ...(options.bridge === true
      ? {
          inNetwork: async (command: string, args: readonly string[]) => {
            const target = ["--net", "--target", String(daemon?.pid ?? 0)];
            const { stdout } = await run("nsenter", [...target, command, ...args], { timeout: 20_000 });
            return stdout;
          },
        }
      : {}),
    async stop() {
      if (daemon) {
        const containers = (await engine.api("GET", "/containers/json?all=1").catch(() => [])) as {
          Id: string;
        }[];
        for (const { Id } of containers) {
          await engine.api("DELETE", `/containers/${Id}?force=1&v=1`).catch(() => undefined);
        }
      }
      await stop();
      await removeDir();
    },
  };
}
