/** Images of the simulated engine: a few are built in, any other ordinary name can be pulled. */
import { createHash } from "node:crypto";
import { existsSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { z } from "zod";
import { writeJson } from "../nvidia-smi/state.ts";
import { EngineError, type Call, flag, route, sendJson, type Route } from "./http.ts";
import type { EventLog } from "./events.ts";

interface Image {
  readonly id: string;
  readonly name: string;
  readonly createdAt: string;
  readonly sizeBytes: number;
  readonly env: readonly string[];
  readonly command: readonly string[];
}

const storedSchema = z.array(
  z.object({
    id: z.string(),
    name: z.string(),
    createdAt: z.string(),
    sizeBytes: z.number(),
    env: z.array(z.string()),
    command: z.array(z.string()),
  }),
);

const path = ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"];

/** Present from the start. What they do is in `worker.ts`. */
const builtIn: readonly { name: string; env: readonly string[]; command: readonly string[] }[] = [
  { name: "sim/burn:latest", env: path, command: ["burn"] },
  { name: "sim/ticker:latest", env: path, command: ["ticker"] },
  { name: "sim/idle:latest", env: path, command: ["sleep", "infinity"] },
  // As many public CUDA images do.
  {
    name: "sim/all-gpus:latest",
    env: [...path, "NVIDIA_VISIBLE_DEVICES=all", "NVIDIA_DRIVER_CAPABILITIES=compute,utility"],
    command: ["ticker"],
  },
];

/** `name` with its tag; the registry part may hold a port, so only a colon after the last slash is a tag. */
function withTag(reference: string, tag?: string | null): string {
  // The default registry goes without saying, as in the real engine.
  const name = reference.replace(/^(?:docker\.io|index\.docker\.io)\//, "").replace(/^library\//, "");
  if (name.includes("@")) return name;
  const last = name.slice(name.lastIndexOf("/") + 1);
  return last.includes(":")
    ? name
    : `${name}:${tag === undefined || tag === null || tag === "" ? "latest" : tag}`;
}

export interface ImageStore {
  /** Throws 404 `No such image`. */
  find(name: string): Image;
  count(): number;
  readonly routes: readonly Route[];
}

const sha = (text: string): string => createHash("sha256").update(text).digest("hex");

function describe(image: Image): Record<string, unknown> {
  const repository = image.name.replace(/:[^/:]*$/, "");
  return {
    Id: image.id,
    RepoTags: [image.name],
    RepoDigests: [`${repository}@sha256:${sha(image.name)}`],
    Parent: "",
    Comment: "",
    Created: image.createdAt,
    Architecture: "amd64",
    Os: "linux",
    Size: image.sizeBytes,
    Config: {
      Env: image.env,
      Cmd: image.command,
      Entrypoint: null,
      WorkingDir: "/",
      Labels: {},
      User: "",
      ExposedPorts: {},
      Volumes: null,
    },
    RootFS: { Type: "layers", Layers: [`sha256:${sha(`${image.name}:layer`)}`] },
  };
}

export function createImageStore(options: {
  readonly dir: string;
  readonly events: EventLog;
  readonly now: () => number;
  readonly sleep: (ms: number) => Promise<unknown>;
  readonly inUse: (imageId: string) => boolean;
}): ImageStore {
  const file = join(options.dir, "images.json");
  const makeImage = (name: string, env: readonly string[], command: readonly string[]): Image => ({
    id: `sha256:${sha(`image:${name}`)}`,
    name,
    createdAt: new Date(options.now()).toISOString(),
    sizeBytes: 64 << 20,
    env,
    command,
  });
  const images = new Map<string, Image>();
  if (existsSync(file)) {
    for (const image of storedSchema.parse(JSON.parse(readFileSync(file, "utf8"))))
      images.set(image.name, image);
  }
  for (const { name, env, command } of builtIn) {
    if (!images.has(name)) images.set(name, makeImage(name, env, command));
  }
  const save = (): void => writeJson(file, [...images.values()]);
  save();

  const find = (name: string): Image => {
    const found =
      images.get(withTag(name)) ??
      [...images.values()].find(
        (image) => image.id === name || image.id.replace("sha256:", "").startsWith(name),
      );
    if (!found) throw new EngineError(404, `No such image: ${withTag(name)}`);
    return found;
  };

  const pull = async ({ query, request, response }: Call): Promise<void> => {
    const from = query.get("fromImage");
    if (from === null || from === "")
      throw new EngineError(400, "fromImage is missing: the simulated engine imports nothing");
    const name = withTag(from, query.get("tag"));
    if (!/^[a-z0-9._\-/:@]+$/.test(name)) throw new EngineError(400, "invalid reference format");
    const repository = name.replace(/:[^/:]*$/, "");
    // Names that behave badly on purpose.
    if (repository.endsWith("sim/missing")) {
      throw new EngineError(
        404,
        `pull access denied for ${repository}, repository does not exist or may require 'docker login': denied: requested access to the resource is denied`,
      );
    }
    if (repository.endsWith("sim/private") && request.headers["x-registry-auth"] === undefined) {
      throw new EngineError(
        500,
        `Head "https://registry/v2/${repository}/manifests/latest": unauthorized: authentication required`,
      );
    }
    response.writeHead(200, { "Content-Type": "application/json" });
    const tell = (line: Record<string, unknown>): void => {
      response.write(`${JSON.stringify(line)}\r\n`);
    };
    tell({ status: `Pulling from ${repository}`, id: name.slice(repository.length + 1) });
    const layer = sha(`${name}:layer`).slice(0, 12);
    tell({ status: "Pulling fs layer", progressDetail: {}, id: layer });
    const total = 64 << 20;
    const stepMs = repository.endsWith("sim/slow") ? 1_000 : 20;
    for (let step = 1; step <= 4; step++) {
      await options.sleep(stepMs);
      if (response.destroyed) return;
      tell({
        status: "Downloading",
        progressDetail: { current: (total / 4) * step, total },
        progress: `${16 * step}MB/64MB`,
        id: layer,
      });
      if (step === 2 && repository.endsWith("sim/broken")) {
        const message = "unexpected EOF";
        tell({ errorDetail: { message }, error: message });
        response.end();
        return;
      }
    }
    tell({ status: "Pull complete", progressDetail: {}, id: layer });
    tell({ status: `Digest: sha256:${sha(name)}` });
    const known = images.has(name);
    if (!known) {
      images.set(name, makeImage(name, path, ["ticker"]));
      save();
    }
    tell({ status: `Status: ${known ? "Image is up to date" : "Downloaded newer image"} for ${name}` });
    options.events.emit("image", "pull", name, { name: repository });
    response.end();
  };

  return {
    find,
    count: () => images.size,
    routes: [
      route("GET", "/images/json", ({ response }) => {
        sendJson(
          response,
          200,
          [...images.values()].map((image) => ({
            Id: image.id,
            RepoTags: [image.name],
            RepoDigests: [],
            Created: Math.floor(Date.parse(image.createdAt) / 1000),
            Size: image.sizeBytes,
            Labels: {},
            Containers: -1,
          })),
        );
      }),
      route("POST", "/images/create", pull),
      route("GET", "/images/:name*/json", ({ parameters, response }) => {
        sendJson(response, 200, describe(find(parameters["name"] ?? "")));
      }),
      route("DELETE", "/images/:name*", ({ parameters, query, response }) => {
        const image = find(parameters["name"] ?? "");
        if (options.inUse(image.id) && !flag(query, "force")) {
          throw new EngineError(
            409,
            `conflict: unable to remove repository reference "${image.name}" (must force) - a container is using its referenced image`,
          );
        }
        images.delete(image.name);
        save();
        sendJson(response, 200, [{ Untagged: image.name }, { Deleted: image.id }]);
      }),
    ],
  };
}
