/** Volumes and networks of the simulated engine: enough for a client to make, find and remove them. */
import { createHash, randomBytes } from "node:crypto";
import { existsSync, mkdirSync, readFileSync, rmSync } from "node:fs";
import { join } from "node:path";
import { z } from "zod";
import { writeJson } from "../nvidia-smi/state.ts";
import type { EventLog } from "./events.ts";
import {
  EngineError,
  filters,
  flag,
  matchesLabels,
  readJsonBody,
  route,
  sendEmpty,
  sendJson,
  type Route,
} from "./http.ts";

const labelsSchema = z
  .record(z.string(), z.string())
  .nullish()
  .transform((labels) => labels ?? {});

const volumeBodySchema = z.looseObject({
  Name: z
    .string()
    .regex(/^[a-zA-Z0-9][a-zA-Z0-9_.-]{0,254}$/)
    .or(z.literal(""))
    .optional(),
  Driver: z.string().optional(),
  Labels: labelsSchema,
});

const networkBodySchema = z.looseObject({
  Name: z.string().min(1),
  Driver: z.string().optional(),
  Labels: labelsSchema,
});

const storedSchema = z.object({
  volumes: z.array(
    z.object({ name: z.string(), labels: z.record(z.string(), z.string()), createdAt: z.string() }),
  ),
  networks: z.array(
    z.object({
      id: z.string(),
      name: z.string(),
      driver: z.string(),
      labels: z.record(z.string(), z.string()),
      createdAt: z.string(),
    }),
  ),
});
type Stored = z.infer<typeof storedSchema>;

export interface Resources {
  /** Path of a named volume, made when missing, as starting a container does. */
  ensureVolume(name: string): string;
  isNetwork(name: string): boolean;
  readonly routes: readonly Route[];
}

function check<T>(schema: z.ZodType<T>, body: unknown): T {
  const parsed = schema.safeParse(body);
  if (!parsed.success) {
    throw new EngineError(
      400,
      parsed.error.issues.map((issue) => `${issue.path.join(".")}: ${issue.message}`).join("; "),
    );
  }
  return parsed.data;
}

export function createResources(options: {
  readonly dir: string;
  readonly events: EventLog;
  readonly now: () => number;
  readonly volumeInUse: (name: string) => string | undefined;
}): Resources {
  const file = join(options.dir, "resources.json");
  const createdAt = (): string => new Date(options.now()).toISOString();
  const stored: Stored = existsSync(file)
    ? storedSchema.parse(JSON.parse(readFileSync(file, "utf8")))
    : {
        volumes: [],
        networks: ["bridge", "host", "none"].map((name) => ({
          id: createHash("sha256").update(name).digest("hex"),
          name,
          driver: name === "none" ? "null" : name,
          labels: {},
          createdAt: createdAt(),
        })),
      };
  const save = (): void => writeJson(file, stored);
  save();

  const mountpoint = (name: string): string => join(options.dir, "volumes", name, "_data");
  const volumeJson = (volume: Stored["volumes"][number]): Record<string, unknown> => ({
    Name: volume.name,
    Driver: "local",
    Mountpoint: mountpoint(volume.name),
    CreatedAt: volume.createdAt,
    Labels: volume.labels,
    Options: null,
    Scope: "local",
  });
  const networkJson = (network: Stored["networks"][number]): Record<string, unknown> => ({
    Name: network.name,
    Id: network.id,
    Created: network.createdAt,
    Scope: "local",
    Driver: network.driver,
    Labels: network.labels,
    IPAM: { Driver: "default", Config: [] },
    Containers: {},
    Options: {},
  });
  const makeVolume = (name: string, labels: Record<string, string>): Stored["volumes"][number] => {
    const existing = stored.volumes.find((volume) => volume.name === name);
    if (existing) return existing;
    const volume = { name, labels, createdAt: createdAt() };
    mkdirSync(mountpoint(name), { recursive: true });
    stored.volumes.push(volume);
    save();
    options.events.emit("volume", "create", name, { driver: "local" });
    return volume;
  };
  const findVolume = (name: string): Stored["volumes"][number] => {
    const volume = stored.volumes.find((candidate) => candidate.name === name);
    if (!volume) throw new EngineError(404, `get ${name}: no such volume`);
    return volume;
  };
  const findNetwork = (name: string): Stored["networks"][number] => {
    const network = stored.networks.find(
      (candidate) => candidate.name === name || candidate.id.startsWith(name),
    );
    if (!network) throw new EngineError(404, `network ${name} not found`);
    return network;
  };

  return {
    ensureVolume: (name) => {
      makeVolume(name, {});
      return mountpoint(name);
    },
    isNetwork: (name) =>
      stored.networks.some((network) => network.name === name || network.id.startsWith(name)),
    routes: [
      route("GET", "/volumes", ({ query, response }) => {
        const wanted = filters(query);
        const found = stored.volumes.filter(
          (volume) =>
            matchesLabels(volume.labels, wanted["label"] ?? []) &&
            (wanted["name"]?.some((name) => volume.name.includes(name)) ?? true),
        );
        sendJson(response, 200, { Volumes: found.map(volumeJson), Warnings: null });
      }),
      route("POST", "/volumes/create", async ({ request, response }) => {
        const body = check(volumeBodySchema, await readJsonBody(request));
        const name =
          body.Name === undefined || body.Name === "" ? randomBytes(32).toString("hex") : body.Name;
        sendJson(response, 201, volumeJson(makeVolume(name, body.Labels)));
      }),
      route("GET", "/volumes/:name", ({ parameters, response }) => {
        sendJson(response, 200, volumeJson(findVolume(parameters["name"] ?? "")));
      }),
      route("DELETE", "/volumes/:name", ({ parameters, query, response }) => {
        const volume = findVolume(parameters["name"] ?? "");
        const user = options.volumeInUse(volume.name);
        if (user !== undefined && !flag(query, "force")) {
          throw new EngineError(409, `remove ${volume.name}: volume is in use - [${user}]`);
        }
        rmSync(join(options.dir, "volumes", volume.name), { recursive: true, force: true });
        stored.volumes.splice(stored.volumes.indexOf(volume), 1);
        save();
        options.events.emit("volume", "destroy", volume.name, { driver: "local" });
        sendEmpty(response, 204);
      }),
      route("GET", "/networks", ({ query, response }) => {
        const wanted = filters(query);
        sendJson(
          response,
          200,
          stored.networks
            .filter(
              (network) =>
                matchesLabels(network.labels, wanted["label"] ?? []) &&
                (wanted["name"]?.some((name) => network.name.includes(name)) ?? true),
            )
            .map(networkJson),
        );
      }),
      route("POST", "/networks/create", async ({ request, response }) => {
        const body = check(networkBodySchema, await readJsonBody(request));
        if (stored.networks.some((network) => network.name === body.Name)) {
          throw new EngineError(409, `network with name ${body.Name} already exists`);
        }
        const network = {
          id: randomBytes(32).toString("hex"),
          name: body.Name,
          driver: body.Driver ?? "bridge",
          labels: body.Labels,
          createdAt: createdAt(),
        };
        stored.networks.push(network);
        save();
        sendJson(response, 201, { Id: network.id, Warning: "" });
      }),
      route("GET", "/networks/:name", ({ parameters, response }) => {
        sendJson(response, 200, networkJson(findNetwork(parameters["name"] ?? "")));
      }),
      route("DELETE", "/networks/:name", ({ parameters, response }) => {
        const network = findNetwork(parameters["name"] ?? "");
        if (["bridge", "host", "none"].includes(network.name)) {
          throw new EngineError(403, `${network.name} is a pre-defined network and cannot be removed`);
        }
        stored.networks.splice(stored.networks.indexOf(network), 1);
        save();
        sendEmpty(response, 204);
      }),
    ],
  };
}
