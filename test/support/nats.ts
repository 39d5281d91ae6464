import { spawn, type ChildProcess } from "node:child_process";
import { once } from "node:events";
import { accessSync, constants } from "node:fs";
import { mkdtemp, readFile, rm } from "node:fs/promises";
import { connect as connectTcp, createServer, type AddressInfo } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { setTimeout as delay } from "node:timers/promises";

const candidates = [
  ...(process.env["PATH"] ?? "").split(":").map((dir) => join(dir, "nats-server")),
  "/usr/sbin/nats-server",
];

/** The NATS server's binary, or undefined where it is not installed: a test then skips by name. */
export function natsServerBinary(): string | undefined {
  return candidates.find((path) => {
    try {
      accessSync(path, constants.X_OK);
      return true;
    } catch {
      return false;
    }
  });
}

export interface NatsServer {
  readonly url: string;
  /** As a power cut: SIGKILL, the store stays. */
  kill(): Promise<void>;
  /** Starts again on the same port and store. */
  restart(): Promise<void>;
  /** Ends it and removes the store. */
  close(): Promise<void>;
}

async function freePort(): Promise<number> {
  const server = createServer();
  server.listen(0, "127.0.0.1");
  await once(server, "listening");
  const { port } = server.address() as AddressInfo;
  server.close();
  await once(server, "close");
  return port;
}

async function accepts(port: number): Promise<boolean> {
  const socket = connectTcp({ host: "127.0.0.1", port });
  try {
    // The server greets with INFO only when it is ready for clients.
    const [data] = (await once(socket, "data", { signal: AbortSignal.timeout(1000) })) as [Buffer];
    return data.toString("latin1").startsWith("INFO ");
  } catch {
    return false;
  } finally {
    socket.destroy();
  }
}

/** A private nats-server with JetStream on a loopback port. Throws when it does not get ready in 15 s. */
export async function startNatsServer(): Promise<NatsServer> {
  const binary = natsServerBinary();
  if (binary === undefined) throw new Error("nats-server is not installed");
  const directory = await mkdtemp(join(tmpdir(), "palebluedot-nats-"));
  const port = await freePort();
  const logFile = join(directory, "log");
  let child: ChildProcess | undefined;

  async function start(): Promise<void> {
    child = spawn(
      binary ?? "nats-server",
      [
        "--jetstream",
        "--addr",
        "127.0.0.1",
        "--port",
        String(port),
        "--store_dir",
        directory,
        "--log",
        logFile,
      ],
      { stdio: "ignore" },
    );
    const deadline = Date.now() + 15_000;
    while (!(await accepts(port))) {
      if (child.exitCode !== null || Date.now() > deadline) {
        throw new Error(
          `nats-server did not start: ${await readFile(logFile, "utf8").catch(() => "no log")}`,
        );
      }
      await delay(20);
    }
  }

  async function kill(): Promise<void> {
    const running = child;
    child = undefined;
    if (running === undefined || running.exitCode !== null || running.signalCode !== null) return;
    const exited = once(running, "exit");
    running.kill("SIGKILL");
    await exited;
  }

  await start();
  return {
    url: `nats://127.0.0.1:${port}`,
    kill,
    restart: start,
    async close() {
      await kill();
      await rm(directory, { recursive: true, force: true });
    },
  };
}
