/**
 * A simulated container engine: the part of the Docker Engine API an agent uses, on a unix socket, over the
 * state directory of a simulated server. It names itself a simulation in its version.
 */
import { createHash } from "node:crypto";
import { existsSync, mkdirSync, readFileSync, rmSync } from "node:fs";
import { createServer, type Server } from "node:http";
import { createConnection } from "node:net";
import { arch, cpus, release, totalmem } from "node:os";
import { dirname, join, resolve } from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import { z } from "zod";
import { errorMessage, isPlatformError, PlatformError } from "@palebluedot/shared/errors.ts";
import {
  paths,
  processStartTicks,
  readServer,
  writeJson,
  type ServerDescription,
} from "../nvidia-smi/state.ts";
import { containerRoutes } from "./container-routes.ts";
import { createContainerManager } from "./containers.ts";
import { createEventLog } from "./events.ts";
import { route, sendJson, type Route } from "./http.ts";
import { createImageStore } from "./images.ts";
import { createResources, type Resources } from "./resources.ts";

/** Agents recognise the simulation by this name in the version. */
const engineName = "palebluedot-simulated-engine";
const engineVersion = `28.0.0-${engineName}`;
const apiVersion = "1.48";

export interface SimulatedEngine {
  readonly socketPath: string;
  /** For DOCKER_HOST. */
  readonly dockerHost: string;
  /** Ends the engine; containers run on, and the next engine on this directory adopts them. */
  stop(): Promise<void>;
  /** Ends the engine and every container. */
  destroy(): Promise<void>;
}

export interface EngineOptions {
  /** Of a simulated server; without one in it the engine has no GPUs. */
  readonly stateDir: string;
  readonly socketPath: string;
  readonly now?: () => number;
}

const device = (name: string, minors: readonly number[]): Record<string, unknown> => ({
  name,
  containerEdits: { deviceNodes: minors.map((minor) => ({ path: `/dev/nvidia${minor}` })) },
});

/** A CDI specification as the NVIDIA toolkit writes it, so that clients find the devices. */
function writeCdi(dir: string, server: ServerDescription): void {
  mkdirSync(dir, { recursive: true });
  writeJson(join(dir, "nvidia.json"), {
    cdiVersion: "0.5.0",
    kind: "nvidia.com/gpu",
    devices: [
      ...server.gpus.flatMap((gpu) => [
        device(gpu.uuid, [gpu.minorNumber]),
        device(String(gpu.index), [gpu.minorNumber]),
      ]),
      device(
        "all",
        server.gpus.map((gpu) => gpu.minorNumber),
      ),
    ],
    containerEdits: { deviceNodes: [{ path: "/dev/nvidiactl" }], env: ["NVIDIA_VISIBLE_DEVICES=void"] },
  });
}

function answers(socketPath: string): Promise<boolean> {
  return new Promise((done) => {
    const socket = createConnection(socketPath);
    socket.once("connect", () => {
      socket.destroy();
      done(true);
    });
    socket.once("error", () => done(false));
  });
}

function listen(server: Server, socketPath: string): Promise<void> {
  return new Promise((done, fail) => {
    server.once("error", fail);
    server.listen(socketPath, () => {
      server.off("error", fail);
      done();
    });
  });
}

const ownerSchema = z.object({ pid: z.number(), start_ticks: z.number() });

/** Two engines on one directory would both restart its containers. */
function refuseSecondEngine(ownership: string, stateDir: string): void {
  if (!existsSync(ownership)) return;
  const owner = ownerSchema.safeParse(JSON.parse(readFileSync(ownership, "utf8")));
  if (!owner.success || processStartTicks(owner.data.pid) !== owner.data.start_ticks) return;
  throw new PlatformError({
    code: "simulated-engine-running",
    kind: "conflict",
    message: `process ${owner.data.pid} runs an engine on ${stateDir} already`,
    hint: "stop it, or make another server",
  });
}

/**
 * Starts the engine. Throws `simulated-engine-running` when the socket is answered already, or another engine
 * works on the directory.
 */
export async function startEngine(options: EngineOptions): Promise<SimulatedEngine> {
  const stateDir = resolve(options.stateDir);
  const dir = join(stateDir, "engine");
  mkdirSync(dir, { recursive: true, mode: 0o750 });
  mkdirSync(dirname(options.socketPath), { recursive: true });
  if (existsSync(options.socketPath)) {
    if (await answers(options.socketPath)) {
      throw new PlatformError({
        code: "simulated-engine-running",
        kind: "conflict",
        message: `an engine answers at ${options.socketPath} already`,
        hint: "stop it, or choose another socket",
      });
    }
    // Left by an engine that was killed.
    rmSync(options.socketPath, { force: true });
  }
  const ownership = join(dir, "owner.json");
  refuseSecondEngine(ownership, stateDir);
  writeJson(ownership, { pid: process.pid, start_ticks: processStartTicks(process.pid) ?? 0 });
  const server = existsSync(paths.server(stateDir)) ? readServer(stateDir) : undefined;
  const cdiDir = join(dir, "cdi");
  if (server) writeCdi(cdiDir, server);

  const now = options.now ?? Date.now;
  const events = createEventLog(now);
  const images = createImageStore({
    dir,
    events,
    now,
    sleep,
    inUse: (id) => containers.list().some((record) => record.imageId === id),
  });
  const resources: Resources = createResources({
    dir,
    events,
    now,
    volumeInUse: (name) =>
      containers.list().find((record) => record.mounts.some((mount) => mount.Name === name))?.id,
  });
  const containers = createContainerManager({
    dir,
    stateDir,
    server,
    images,
    resources: () => resources,
    events,
    now,
    sleep,
  });

  const version = {
    Platform: { Name: engineName },
    Version: engineVersion,
    ApiVersion: apiVersion,
    MinAPIVersion: "1.24",
    Os: "linux",
    Arch: arch() === "x64" ? "amd64" : arch(),
    KernelVersion: release(),
    Components: [
      {
        Name: "Engine",
        Version: engineVersion,
        Details: {
          ApiVersion: apiVersion,
          MinAPIVersion: "1.24",
          Os: "linux",
          Arch: arch() === "x64" ? "amd64" : arch(),
          KernelVersion: release(),
          GoVersion: "none",
          GitCommit: "none",
          BuildTime: "",
          Experimental: "false",
        },
      },
    ],
  };
  const info = (): Record<string, unknown> => {
    const list = containers.list();
    const running = list.filter((record) => record.state.status === "running").length;
    return {
      ID: createHash("sha256").update(stateDir).digest("hex").slice(0, 36),
      Name: server?.hostname ?? "simulated",
      ServerVersion: engineVersion,
      OperatingSystem: engineName,
      OSType: "linux",
      Architecture: "x86_64",
      KernelVersion: release(),
      Containers: list.length,
      ContainersRunning: running,
      ContainersPaused: 0,
      ContainersStopped: list.length - running,
      Images: images.count(),
      Driver: "simulated",
      LoggingDriver: "json-file",
      CgroupDriver: "none",
      CgroupVersion: "2",
      NCPU: cpus().length,
      MemTotal: totalmem(),
      MemoryLimit: true,
      SwapLimit: true,
      PidsLimit: true,
      CpuCfsPeriod: true,
      CpuCfsQuota: true,
      DockerRootDir: dir,
      Runtimes: {
        runc: { path: "runc" },
        ...(server ? { nvidia: { path: "nvidia-container-runtime" } } : {}),
      },
      DefaultRuntime: "runc",
      CDISpecDirs: server ? [cdiDir] : [],
      DiscoveredDevices: (server?.gpus ?? []).map((gpu) => ({
        Source: "cdi",
        ID: `nvidia.com/gpu=${gpu.uuid}`,
      })),
      SecurityOptions: [],
      Warnings: ["This engine is a simulation: nothing of an image is executed."],
      Labels: ["palebluedot.simulated=true"],
    };
  };
  const ping: Route["handle"] = ({ response }) => {
    response.writeHead(200, {
      "Api-Version": apiVersion,
      "Docker-Experimental": "false",
      OSType: "linux",
      "Content-Type": "text/plain; charset=utf-8",
    });
    response.end("OK");
  };
  const routes: readonly Route[] = [
    route("GET", "/_ping", ping),
    route("HEAD", "/_ping", ping),
    route("GET", "/version", ({ response }) => sendJson(response, 200, version)),
    route("GET", "/info", ({ response }) => sendJson(response, 200, info())),
    route("GET", "/events", (call) => events.stream(call)),
    ...containerRoutes(containers, sleep),
    ...images.routes,
    ...resources.routes,
  ];

  const http = createServer((request, response) => {
    response.setHeader("Server", engineName);
    const url = new URL(request.url ?? "/", "http://engine");
    const found = routes
      .map((candidate) => ({ candidate, match: candidate.pattern.exec(url.pathname) }))
      .find(({ candidate, match }) => match !== null && candidate.method === request.method);
    const run = async (): Promise<void> => {
      if (!found) {
        sendJson(response, 404, { message: "page not found" });
        return;
      }
      const parameters = Object.fromEntries(
        Object.entries(found.match?.groups ?? {}).map(([name, value]) => [name, decodeURIComponent(value)]),
      );
      await found.candidate.handle({ request, response, parameters, query: url.searchParams });
    };
    run().catch((error: unknown) => {
      if (response.headersSent) response.destroy();
      else
        sendJson(response, isPlatformError(error) ? (error.status ?? 500) : 500, {
          message: errorMessage(error),
        });
    });
  });
  await listen(http, options.socketPath);

  let stopping: Promise<void> | undefined;
  const stop = (): Promise<void> => {
    stopping ??= new Promise((done) => {
      containers.close();
      events.close();
      http.close(() => {
        rmSync(options.socketPath, { force: true });
        rmSync(ownership, { force: true });
        done();
      });
      http.closeAllConnections();
    });
    return stopping;
  };
  return {
    socketPath: options.socketPath,
    dockerHost: `unix://${options.socketPath}`,
    stop,
    async destroy() {
      await Promise.all(containers.list().map((record) => containers.remove(record.id, true)));
      await stop();
    },
  };
}
