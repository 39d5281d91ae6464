import { existsSync, mkdirSync, symlinkSync } from "node:fs";
import { join } from "node:path";
import { execa } from "execa";
import { eventually } from "../cluster/eventually.ts";
import { startPart, type RunningProcess } from "../cluster/process.ts";
import type { SimulatedServer } from "../server.ts";
import { engineGet, loadFromContainers } from "./docker-load.ts";

/** What runs the demo's containers. */
export interface DemoEngine {
  readonly description: string;
  readonly image: string;
  readonly command: readonly string[];
  agentEnv(server: SimulatedServer): Record<string, string>;
  stop(): Promise<void>;
}

const realImage = "busybox:stable";
const training = [
  "sh",
  "-c",
  'i=0; while true; do i=$((i+1)); echo "step $i loss 0.$((1000-i%1000))"; sleep 1; done',
];

/** A Docker Engine where one answers and has (or gets) the image; else the simulated one, named as such. */
export async function chooseEngine(
  directory: string,
  servers: readonly SimulatedServer[],
): Promise<DemoEngine> {
  const socketPath = dockerSocket();
  const why = await unusable(socketPath);
  return why === undefined ? realEngine(socketPath, servers) : simulatedEngine(directory, servers, why);
}

function dockerSocket(): string {
  const host = process.env["DOCKER_HOST"] ?? "unix:///var/run/docker.sock";
  return host.startsWith("unix://") ? host.slice("unix://".length) : "";
}

async function unusable(socketPath: string): Promise<string | undefined> {
  if (socketPath === "" || !existsSync(socketPath)) return "no Docker Engine on this machine";
  try {
    await engineGet(socketPath, "/_ping");
  } catch {
    return "the Docker Engine does not answer";
  }
  try {
    await engineGet(socketPath, `/images/${realImage}/json`);
    return undefined;
  } catch {
    const pulled = await execa("docker", ["pull", "--quiet", realImage], {
      env: { DOCKER_HOST: `unix://${socketPath}` },
      timeout: 60_000,
      reject: false,
    });
    return pulled.exitCode === 0 ? undefined : `the Docker Engine cannot pull ${realImage}`;
  }
}

function realEngine(socketPath: string, servers: readonly SimulatedServer[]): DemoEngine {
  const load = loadFromContainers(socketPath, servers);
  return {
    description: `Docker Engine at ${socketPath}`,
    image: realImage,
    command: training,
    agentEnv: (server) => ({
      DOCKER_HOST: `unix://${socketPath}`,
      PALEBLUEDOT_GPU_MODE: "device-nodes",
      PALEBLUEDOT_DEVICE_DIR: deviceNodes(server),
    }),
    stop: () => {
      load.stop();
      return Promise.resolve();
    },
  };
}

/** Stand-ins for /dev/nvidia*: the engine follows the links, and making them needs no privilege. */
function deviceNodes(server: SimulatedServer): string {
  const directory = join(server.stateDir, "dev");
  mkdirSync(directory);
  const names = ["nvidiactl", "nvidia-uvm", ...server.gpus.map((gpu) => `nvidia${gpu.minorNumber}`)];
  for (const name of names) symlinkSync("/dev/null", join(directory, name));
  return directory;
}

async function simulatedEngine(
  directory: string,
  servers: readonly SimulatedServer[],
  why: string,
): Promise<DemoEngine> {
  const engines: RunningProcess[] = [];
  const sockets = new Map<string, string>();
  for (const server of servers) {
    const socket = join(server.stateDir, "engine.sock");
    sockets.set(server.stateDir, socket);
    engines.push(
      startPart("simulator", ["engine", "--state", server.stateDir, "--socket", socket], {
        env: {},
        logFile: join(server.stateDir, "engine.log"),
      }),
    );
  }
  await eventually(
    "the simulated engines answer",
    async () => {
      const dead = engines.find((part) => !part.isRunning());
      if (dead !== undefined) throw new Error(`a simulated engine ended:\n${dead.logTail()}`);
      for (const socket of sockets.values()) await engineGet(socket, "/_ping");
      return true;
    },
    { timeoutMs: 20_000 },
  );
  return {
    description: `SIMULATED, containers are stand-in processes (${why}; ${directory})`,
    image: "sim/burn",
    command: [],
    agentEnv: (server) => ({ DOCKER_HOST: `unix://${sockets.get(server.stateDir) ?? ""}` }),
    async stop() {
      for (const part of engines) await part.stop(5000);
    },
  };
}
