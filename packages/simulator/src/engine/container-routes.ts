/** The container part of the engine's API. */
import { join } from "node:path";
import { assertNever } from "@palebluedot/shared/errors.ts";
import { createBodySchema, type ContainerRecord } from "./container-config.ts";
import type { ContainerManager } from "./containers.ts";
import {
  EngineError,
  filters,
  flag,
  matchesLabels,
  readJsonBody,
  route,
  sendEmpty,
  sendJson,
  type Call,
  type Route,
} from "./http.ts";
import { serveLogs } from "./logs.ts";

const reference = (call: Call): string => call.parameters["id"] ?? "";

function seconds(query: URLSearchParams): number | undefined {
  const text = query.get("t");
  if (text === null || text === "") return undefined;
  const value = Number(text);
  if (!Number.isInteger(value)) throw new EngineError(400, `invalid value for "t": ${text}`);
  return value;
}

const ago = (time: string): string =>
  `${Math.max(0, Math.round((Date.now() - Date.parse(time)) / 1000))} seconds`;

function statusText(record: ContainerRecord): string {
  const { status, exitCode, startedAt, finishedAt } = record.state;
  switch (status) {
    case "created":
      return "Created";
    case "running":
      return `Up ${ago(startedAt)}`;
    case "restarting":
      return `Restarting (${exitCode}) ${ago(finishedAt)} ago`;
    case "exited":
      return `Exited (${exitCode}) ${ago(finishedAt)} ago`;
    default:
      return assertNever(status, "status");
  }
}

function networks(record: ContainerRecord): Record<string, unknown> {
  const mode = record.body.HostConfig?.NetworkMode ?? "default";
  const name = mode === "default" ? "bridge" : mode;
  return {
    [name]: { NetworkID: "", EndpointID: "", Gateway: "", IPAddress: "", IPPrefixLen: 0, MacAddress: "" },
  };
}

function inspect(containers: ContainerManager, record: ContainerRecord): Record<string, unknown> {
  const { state, body } = record;
  const { HostConfig, NetworkingConfig: _networking, ...config } = body;
  return {
    Id: record.id,
    Created: record.createdAt,
    Path: record.command[0] ?? "",
    Args: record.command.slice(1),
    State: {
      Status: state.status,
      Running: state.status === "running",
      Paused: false,
      Restarting: state.status === "restarting",
      OOMKilled: state.oomKilled,
      Dead: false,
      Pid: state.pid,
      ExitCode: state.exitCode,
      Error: state.error,
      StartedAt: state.startedAt,
      FinishedAt: state.finishedAt,
    },
    Image: record.imageId,
    LogPath: join(containers.directory(record), "container.log"),
    Name: `/${record.name}`,
    RestartCount: state.restartCount,
    Driver: "simulated",
    Platform: "linux",
    MountLabel: "",
    ProcessLabel: "",
    AppArmorProfile: "",
    ExecIDs: null,
    HostConfig: { NetworkMode: "default", ...HostConfig },
    Mounts: record.mounts,
    Config: {
      ...config,
      Env: record.env,
      Labels: body.Labels ?? {},
      Hostname: body.Hostname ?? record.id.slice(0, 12),
    },
    NetworkSettings: {
      Ports: state.status === "running" ? record.ports : {},
      IPAddress: "",
      Networks: networks(record),
    },
  };
}

function summary(record: ContainerRecord): Record<string, unknown> {
  return {
    Id: record.id,
    Names: [`/${record.name}`],
    Image: record.imageName,
    ImageID: record.imageId,
    Command: record.command.join(" "),
    Created: Math.floor(Date.parse(record.createdAt) / 1000),
    Labels: record.body.Labels ?? {},
    State: record.state.status,
    Status: statusText(record),
    Ports:
      record.state.status === "running"
        ? Object.entries(record.ports).flatMap(([port, bindings]) =>
            bindings.map((binding) => ({
              IP: binding.HostIp,
              PrivatePort: Number(port.split("/")[0]),
              PublicPort: Number(binding.HostPort),
              Type: port.split("/")[1],
            })),
          )
        : [],
    HostConfig: { NetworkMode: record.body.HostConfig?.NetworkMode ?? "default" },
    NetworkSettings: { Networks: networks(record) },
    Mounts: record.mounts,
  };
}

function listed(containers: ContainerManager, query: URLSearchParams): readonly ContainerRecord[] {
  const wanted = filters(query);
  const all = flag(query, "all") || wanted["status"] !== undefined;
  const limit = Number(query.get("limit") ?? 0) || Number.POSITIVE_INFINITY;
  return containers
    .list()
    .filter(
      (record) =>
        (all || record.state.status === "running" || record.state.status === "restarting") &&
        matchesLabels(record.body.Labels ?? {}, wanted["label"] ?? []) &&
        (wanted["status"]?.includes(record.state.status) ?? true) &&
        (wanted["id"]?.some((id) => record.id.startsWith(id)) ?? true) &&
        (wanted["name"]?.some((name) => record.name.includes(name.replaceAll(/[\^$/]/g, ""))) ?? true),
    )
    .toReversed()
    .slice(0, limit);
}

export function containerRoutes(
  containers: ContainerManager,
  sleep: (ms: number) => Promise<unknown>,
): readonly Route[] {
  return [
    route("GET", "/containers/json", ({ query, response }) => {
      sendJson(response, 200, listed(containers, query).map(summary));
    }),
    route("POST", "/containers/create", async ({ request, query, response }) => {
      const parsed = createBodySchema.safeParse(await readJsonBody(request));
      if (!parsed.success) {
        throw new EngineError(
          400,
          parsed.error.issues
            .map((issue) => `${issue.path.join(".") || "config"}: ${issue.message}`)
            .join("; "),
        );
      }
      const record = containers.create(query.get("name") ?? undefined, parsed.data);
      sendJson(response, 201, { Id: record.id, Warnings: [] });
    }),
    route("GET", "/containers/:id/json", (call) => {
      sendJson(call.response, 200, inspect(containers, containers.get(reference(call))));
    }),
    route("POST", "/containers/:id/start", (call) => {
      sendEmpty(call.response, containers.start(reference(call)) ? 204 : 304);
    }),
    route("POST", "/containers/:id/stop", async (call) => {
      sendEmpty(call.response, (await containers.stop(reference(call), seconds(call.query))) ? 204 : 304);
    }),
    route("POST", "/containers/:id/restart", async (call) => {
      await containers.restart(reference(call), seconds(call.query));
      sendEmpty(call.response, 204);
    }),
    route("POST", "/containers/:id/kill", async (call) => {
      await containers.kill(reference(call), call.query.get("signal") ?? "SIGKILL");
      sendEmpty(call.response, 204);
    }),
    route("POST", "/containers/:id/rename", (call) => {
      containers.rename(reference(call), call.query.get("name") ?? "");
      sendEmpty(call.response, 204);
    }),
    route("POST", "/containers/:id/wait", async (call) => {
      const code = containers.wait(reference(call), call.query.get("condition") ?? "not-running");
      // The real engine answers the head at once, and the body when the container has ended.
      call.response.writeHead(200, { "Content-Type": "application/json" });
      call.response.flushHeaders();
      call.response.end(JSON.stringify({ StatusCode: await code }));
    }),
    route("GET", "/containers/:id/logs", async (call) => {
      const record = containers.get(reference(call));
      if (!flag(call.query, "stdout") && !flag(call.query, "stderr")) {
        throw new EngineError(400, "Bad parameters: you must choose at least one stream");
      }
      await serveLogs(call, join(containers.directory(record), "container.log"), {
        tty: record.body.Tty === true,
        sleep,
        isRunning: () => {
          try {
            const { status } = containers.get(record.id).state;
            return status === "running" || status === "restarting";
          } catch {
            return false;
          }
        },
      });
    }),
    route("DELETE", "/containers/:id", async (call) => {
      await containers.remove(reference(call), flag(call.query, "force"));
      sendEmpty(call.response, 204);
    }),
  ];
}
