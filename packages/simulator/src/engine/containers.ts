/**
 * The containers of the simulated engine. Each is a directory with its record, its log and, while it runs, a
 * process of its own that outlives the engine; an engine that starts adopts what still runs.
 */
import { spawn, type ChildProcess } from "node:child_process";
import { randomBytes } from "node:crypto";
import { existsSync, mkdirSync, readdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { z } from "zod";
import { models } from "../nvidia-smi/models.ts";
import { processStartTicks, writeJson, type ServerDescription } from "../nvidia-smi/state.ts";
import {
  containerRecordSchema,
  initialState,
  neverTime,
  type ContainerRecord,
  type ContainerState,
  type CreateBody,
} from "./container-config.ts";
import type { EventLog } from "./events.ts";
import { environmentOf, gpusOf, leaveGpus, occupyGpus } from "./gpus.ts";
import { EngineError } from "./http.ts";
import { chooseMounts, choosePorts } from "./placement.ts";
import type { ImageStore } from "./images.ts";
import type { Resources } from "./resources.ts";

const exitSchema = z.object({ code: z.number(), at: z.string() });
const pollMs = 200;
const firstRestartMs = 100;
const longestRestartMs = 60_000;
const runLongEnoughMs = 10_000;
const workerPath = fileURLToPath(new URL("worker.ts", import.meta.url));

const signals: Readonly<Record<string, number>> = {
  SIGHUP: 1,
  SIGINT: 2,
  SIGQUIT: 3,
  SIGKILL: 9,
  SIGUSR1: 10,
  SIGUSR2: 12,
  SIGTERM: 15,
};

interface Live {
  record: ContainerRecord;
  restartTimer: NodeJS.Timeout | undefined;
  restartDelayMs: number;
  waiters: Set<(code: number) => void>;
}

function isAlive(state: ContainerState): boolean {
  if (state.pid === 0) return false;
  const ticks = processStartTicks(state.pid);
  return ticks !== undefined && (state.startTicks === 0 || ticks === state.startTicks);
}

function signal(pid: number, name: NodeJS.Signals): void {
  try {
    if (pid > 0) process.kill(pid, name);
  } catch {
    // Gone already.
  }
}

export interface ContainerManager {
  list(): readonly ContainerRecord[];
  /** By id, unique id prefix or name. Throws 404. */
  get(reference: string): ContainerRecord;
  directory(record: ContainerRecord): string;
  create(name: string | undefined, body: CreateBody): ContainerRecord;
  /** False when it already runs. */
  start(reference: string): boolean;
  /** Resolves when it has ended; false when it did not run. */
  stop(reference: string, graceSeconds: number | undefined): Promise<boolean>;
  kill(reference: string, signal: string): Promise<void>;
  restart(reference: string, graceSeconds: number | undefined): Promise<void>;
  rename(reference: string, name: string): void;
  remove(reference: string, force: boolean): Promise<void>;
  /** Resolves with the exit code. `next-exit` waits also when it does not run. */
  wait(reference: string, condition: string): Promise<number>;
  close(): void;
}

export function createContainerManager(options: {
  readonly dir: string;
  readonly stateDir: string;
  readonly server: ServerDescription | undefined;
  readonly images: ImageStore;
  readonly resources: () => Resources;
  readonly events: EventLog;
  readonly now: () => number;
  readonly sleep: (ms: number) => Promise<unknown>;
}): ContainerManager {
  const root = join(options.dir, "containers");
  mkdirSync(root, { recursive: true });
  const containers = new Map<string, Live>();
  let closed = false;

  const iso = (): string => new Date(options.now()).toISOString().replace("Z", "000000Z");
  const directory = (record: ContainerRecord): string => join(root, record.id);
  const save = (live: Live, change?: Partial<ContainerState>): void => {
    if (change) live.record = { ...live.record, state: { ...live.record.state, ...change } };
    if (existsSync(directory(live.record)))
      writeJson(join(directory(live.record), "record.json"), live.record);
  };
  const emit = (record: ContainerRecord, action: string, more: Record<string, string> = {}): void =>
    options.events.emit("container", action, record.id, {
      ...record.body.Labels,
      image: record.imageName,
      name: record.name,
      ...more,
    });
  const find = (reference: string): Live => {
    const wanted = reference.replace(/^\//, "");
    const exact =
      containers.get(wanted) ?? [...containers.values()].find((live) => live.record.name === wanted);
    if (exact) return exact;
    const prefixed =
      wanted.length < 4 ? [] : [...containers.values()].filter((live) => live.record.id.startsWith(wanted));
    if (prefixed.length === 1 && prefixed[0]) return prefixed[0];
    throw new EngineError(404, `No such container: ${reference}`);
  };
  /** Called once per run, when the process is known to have ended. */
  const ended = (live: Live, code: number): void => {
    const { record } = live;
    if (record.state.status !== "running") return;
    const ranMs = options.now() - Date.parse(record.state.startedAt);
    leaveGpus(options.stateDir, record, record.state.pid);
    const oomKilled = existsSync(join(directory(record), "oom"));
    const policy = record.body.HostConfig?.RestartPolicy;
    const again =
      !record.state.stopRequested &&
      !closed &&
      (policy?.Name === "always" ||
        policy?.Name === "unless-stopped" ||
        (policy?.Name === "on-failure" &&
          code !== 0 &&
          (!policy.MaximumRetryCount || record.state.restartCount < policy.MaximumRetryCount)));
    save(live, {
      status: again ? "restarting" : "exited",
      pid: 0,
      startTicks: 0,
      exitCode: code,
      oomKilled,
      finishedAt: iso(),
    });
    if (oomKilled) emit(record, "oom");
    emit(record, "die", {
      exitCode: String(code),
      execDuration: String(Math.max(0, Math.round(ranMs / 1000))),
    });
    for (const waiter of live.waiters) waiter(code);
    live.waiters.clear();
    if (again) {
      live.restartDelayMs =
        ranMs > runLongEnoughMs ? firstRestartMs : Math.min(longestRestartMs, live.restartDelayMs * 2);
      live.restartTimer = setTimeout(() => {
        live.restartTimer = undefined;
        if (closed || !containers.has(record.id)) return;
        save(live, { restartCount: live.record.state.restartCount + 1 });
        launch(live);
      }, live.restartDelayMs);
    } else if (record.body.HostConfig?.AutoRemove) {
      void removeLive(live, true);
    }
  };

  const exitCodeOf = (record: ContainerRecord): number => {
    try {
      return exitSchema.parse(JSON.parse(readFileSync(join(directory(record), "exit.json"), "utf8"))).code;
    } catch {
      // It left no word: it was killed.
      return 137;
    }
  };

  const watchChild = (live: Live, child: ChildProcess): void => {
    child.once("exit", (code, signal) =>
      ended(live, code ?? 128 + (signal === null ? 9 : (signals[signal] ?? 9))),
    );
  };

  function launch(live: Live): void {
    const { record } = live;
    const dir = directory(record);
    rmSync(join(dir, "exit.json"), { force: true });
    rmSync(join(dir, "oom"), { force: true });
    const server = options.server;
    writeFileSync(
      join(dir, "work.json"),
      JSON.stringify({
        command: record.command,
        env: environmentOf(record),
        gpus: record.gpus.map((index) => ({
          index,
          name: server === undefined ? "" : models[server.model].name,
          uuid: server?.gpus[index]?.uuid ?? "",
        })),
      }),
      { mode: 0o600 },
    );
    // Its own session, and no pipe to the engine: the container goes on when the engine ends.
    const child = spawn(process.execPath, [workerPath, dir], {
      detached: true,
      stdio: "ignore",
      cwd: "/",
      env: { PATH: process.env["PATH"] ?? "/usr/bin:/bin" },
    });
    child.unref();
    child.on("error", () => ended(live, 127));
    const pid = child.pid ?? 0;
    save(live, {
      status: "running",
      pid,
      startTicks: processStartTicks(pid) ?? 0,
      exitCode: 0,
      error: "",
      oomKilled: false,
      startedAt: iso(),
      finishedAt: neverTime,
      stopRequested: false,
    });
    watchChild(live, child);
    occupyGpus(options.stateDir, options.server, record, pid);
    emit(record, "start");
    const oomAfter = Number(environmentOf(record)["SIM_OOM_AFTER"]);
    if (oomAfter > 0) {
      setTimeout(() => {
        if (live.record.state.pid !== pid) return;
        writeFileSync(join(dir, "oom"), "");
        signal(pid, "SIGKILL");
      }, oomAfter * 1000).unref();
    }
  }

  const untilEnded = (live: Live, timeoutMs: number): Promise<boolean> =>
    new Promise((resolve) => {
      if (live.record.state.status !== "running") {
        resolve(true);
        return;
      }
      const done = (): void => {
        clearTimeout(timer);
        resolve(true);
      };
      const timer = setTimeout(() => {
        live.waiters.delete(done);
        resolve(false);
      }, timeoutMs);
      live.waiters.add(done);
    });

  async function stopLive(live: Live, graceSeconds: number | undefined): Promise<boolean> {
    if (live.restartTimer) {
      clearTimeout(live.restartTimer);
      live.restartTimer = undefined;
      save(live, { status: "exited", stopRequested: true });
      return true;
    }
    if (live.record.state.status !== "running") return false;
    save(live, { stopRequested: true });
    const { pid } = live.record.state;
    const wanted = live.record.body.StopSignal ?? "SIGTERM";
    const name = (wanted in signals ? wanted : "SIGTERM") as NodeJS.Signals;
    emit(live.record, "kill", { signal: String(signals[name]) });
    signal(pid, name);
    const grace = graceSeconds ?? live.record.body.StopTimeout ?? 10;
    if (!(await untilEnded(live, grace < 0 ? 2 ** 31 - 1 : grace * 1000))) {
      emit(live.record, "kill", { signal: "9" });
      signal(pid, "SIGKILL");
      await untilEnded(live, 10_000);
    }
    emit(live.record, "stop");
    return true;
  }

  async function removeLive(live: Live, force: boolean): Promise<void> {
    const { record } = live;
    if (record.state.status === "running" || record.state.status === "restarting") {
      if (!force) {
        throw new EngineError(
          409,
          `cannot remove container "/${record.name}": container is running: stop the container before removing or force remove`,
        );
      }
      await stopLive(live, 0);
    }
    containers.delete(record.id);
    rmSync(directory(record), { recursive: true, force: true });
    emit(live.record, "destroy");
  }

  // What an earlier engine left: running ones are adopted, ended ones noticed, restart policies applied.
  for (const id of readdirSync(root)) {
    try {
      const record = containerRecordSchema.parse(
        JSON.parse(readFileSync(join(root, id, "record.json"), "utf8")),
      );
      const live: Live = {
        record,
        restartTimer: undefined,
        restartDelayMs: firstRestartMs,
        waiters: new Set(),
      };
      containers.set(record.id, live);
      if (record.state.status === "restarting") {
        launch(live);
      } else if (record.state.status === "running" && !isAlive(record.state)) {
        ended(live, exitCodeOf(record));
      }
    } catch {
      // A directory half made by a killed engine holds no container.
      rmSync(join(root, id), { recursive: true, force: true });
    }
  }
  const poll = setInterval(() => {
    for (const live of containers.values()) {
      if (live.record.state.status === "running" && !isAlive(live.record.state)) {
        ended(live, exitCodeOf(live.record));
      }
    }
  }, pollMs);
  poll.unref();

  const uniqueName = (name: string | undefined): string => {
    if (name === undefined || name === "") return `sim_${randomBytes(6).toString("hex")}`;
    const wanted = name.replace(/^\//, "");
    if (!/^[a-zA-Z0-9][a-zA-Z0-9_.-]+$/.test(wanted)) {
      throw new EngineError(
        400,
        `Invalid container name (${name}), only [a-zA-Z0-9][a-zA-Z0-9_.-] are allowed`,
      );
    }
    const holder = [...containers.values()].find((live) => live.record.name === wanted);
    if (holder) {
      throw new EngineError(
        409,
        `Conflict. The container name "/${wanted}" is already in use by container "${holder.record.id}". You have to remove (or rename) that container to be able to reuse that name.`,
      );
    }
    return wanted;
  };

  return {
    list: () => [...containers.values()].map((live) => live.record),
    get: (reference) => find(reference).record,
    directory,
    create(name, body) {
      const image = options.images.find(body.Image);
      const chosenName = uniqueName(name);
      const network = body.HostConfig?.NetworkMode ?? "default";
      if (
        network !== "default" &&
        !network.startsWith("container:") &&
        !options.resources().isNetwork(network)
      ) {
        throw new EngineError(404, `network ${network} not found`);
      }
      const names = new Set((body.Env ?? []).map((entry) => entry.split("=", 1)[0]));
      const entrypoint = body.Entrypoint ?? [];
      const given = body.Cmd ?? [];
      // An entry point given without arguments drops those of the image, as the real engine does.
      const fallback = entrypoint.length > 0 ? [] : image.command;
      const record: ContainerRecord = {
        id: randomBytes(32).toString("hex"),
        name: chosenName,
        createdAt: iso(),
        imageId: image.id,
        imageName: body.Image,
        command: [...entrypoint, ...(given.length > 0 ? given : fallback)],
        env: [...image.env.filter((entry) => !names.has(entry.split("=", 1)[0])), ...(body.Env ?? [])],
        gpus: [...gpusOf(options.server, body)],
        ports: choosePorts(
          body,
          [...containers.values()]
            .map((other) => other.record)
            .filter((other) => other.state.status === "running"),
        ),
        mounts: chooseMounts(body, (name) => options.resources().ensureVolume(name)),
        body,
        state: initialState,
      };
      mkdirSync(join(root, record.id), { mode: 0o700 });
      const live: Live = {
        record,
        restartTimer: undefined,
        restartDelayMs: firstRestartMs,
        waiters: new Set(),
      };
      containers.set(record.id, live);
      save(live);
      emit(record, "create");
      return record;
    },
    start(reference) {
      const live = find(reference);
      if (live.record.state.status === "running") return false;
      if (live.restartTimer) clearTimeout(live.restartTimer);
      live.restartTimer = undefined;
      live.restartDelayMs = firstRestartMs;
      launch(live);
      return true;
    },
    stop: (reference, graceSeconds) => stopLive(find(reference), graceSeconds),
    async kill(reference, name) {
      const live = find(reference);
      if (live.record.state.status !== "running") {
        throw new EngineError(
          409,
          `cannot kill container: ${reference}: container ${live.record.id} is not running`,
        );
      }
      const full = (
        name.startsWith("SIG")
          ? name
          : (Object.entries(signals).find(([, value]) => String(value) === name)?.[0] ?? `SIG${name}`)
      ) as NodeJS.Signals;
      if (!(full in signals)) throw new EngineError(400, `Invalid signal: ${name}`);
      if (full === "SIGKILL" || full === "SIGTERM") save(live, { stopRequested: true });
      emit(live.record, "kill", { signal: String(signals[full]) });
      signal(live.record.state.pid, full);
      if (full === "SIGKILL") await untilEnded(live, 10_000);
    },
    async restart(reference, graceSeconds) {
      const live = find(reference);
      await stopLive(live, graceSeconds);
      launch(live);
      emit(live.record, "restart");
    },
    rename(reference, name) {
      const live = find(reference);
      live.record = { ...live.record, name: uniqueName(name) };
      save(live);
      emit(live.record, "rename");
    },
    remove: (reference, force) => removeLive(find(reference), force),
    wait(reference, condition) {
      const live = find(reference);
      const { status, exitCode } = live.record.state;
      if (
        condition !== "next-exit" &&
        status !== "running" &&
        status !== "restarting" &&
        !(condition === "removed")
      ) {
        return Promise.resolve(exitCode);
      }
      return new Promise((resolve) => live.waiters.add(resolve));
    },
    close() {
      closed = true;
      clearInterval(poll);
      for (const live of containers.values()) if (live.restartTimer) clearTimeout(live.restartTimer);
    },
  };
}
