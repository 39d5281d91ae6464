/**
 * The database server of a test run, as a process of its own: `node testing-server.ts <control socket>`.
 * Test workers connect to the control socket, get one line `{"url"}` or `{"error"}`, and keep the
 * connection for as long as they need the server. It stops by itself a while after the last one left, so
 * that a killed test run leaves nothing behind.
 */
import { mkdir, readdir, rm } from "node:fs/promises";
import { createServer, type Server } from "node:net";
import { basename, dirname, join } from "node:path";
import { errorMessage } from "@palebluedot/shared/errors.ts";
import { createLogger } from "@palebluedot/shared/logger.ts";
import { startEmbeddedPostgres } from "./embedded-postgres.ts";

const lingerMs = 10_000;

async function main(controlSocket: string): Promise<void> {
  const root = dirname(controlSocket);
  const log = createLogger({ name: "test-database", level: "error" });
  let connections = 0;
  let lingering: NodeJS.Timeout | undefined;
  const directory = join(root, `server-${process.pid}`);
  await removeLeftovers(root);
  await mkdir(directory, { recursive: true, mode: 0o711 });
  const started = startEmbeddedPostgres({
    directory,
    log,
    durable: false,
    settings: { max_connections: "300" },
  });
  started.catch(() => undefined);

  async function tidyAndExit(code: number): Promise<void> {
    const embedded = await started.catch(() => undefined);
    await embedded?.stop();
    await rm(directory, { recursive: true, force: true });
    process.exit(code);
  }

  const server = createServer((socket) => {
    connections += 1;
    clearTimeout(lingering);
    socket.on("error", () => undefined);
    socket.on("close", () => {
      connections -= 1;
      if (connections === 0) linger(server);
    });
    started.then(
      (embedded) => socket.write(`${JSON.stringify({ url: embedded.url })}\n`),
      (error: unknown) => socket.write(`${JSON.stringify({ error: errorMessage(error) })}\n`),
    );
  });

  function linger(listening: Server): void {
    lingering = setTimeout(() => {
      listening.close();
      void tidyAndExit(0);
    }, lingerMs);
  }

  server.on("error", () => {
    // Another one listens already.
    void tidyAndExit(3);
  });
  server.listen(controlSocket, () => linger(server));
}

/** Servers whose keeper was killed still run: take each over and stop it. */
async function removeLeftovers(root: string): Promise<void> {
  for (const entry of await readdir(root).catch(() => [])) {
    const pid = Number(/^server-(\d+)$/.exec(basename(entry))?.[1]);
    if (!Number.isSafeInteger(pid) || pid === process.pid || isAlive(pid)) continue;
    const directory = join(root, entry);
    const log = createLogger({ name: "test-database", level: "silent" });
    const leftover = await startEmbeddedPostgres({ directory, log, durable: false }).catch(() => undefined);
    await leftover?.stop();
    await rm(directory, { recursive: true, force: true });
  }
}

function isAlive(pid: number): boolean {
  try {
    process.kill(pid, 0);
    return true;
  } catch {
    return false;
  }
}

const [, , controlSocket] = process.argv;
if (controlSocket !== undefined) await main(controlSocket);
