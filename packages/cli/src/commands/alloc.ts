import { readFile } from "node:fs/promises";
import { PlatformError } from "@palebluedot/shared/errors.ts";
import { z } from "zod";
import type { ApiClient } from "../api.ts";
import {
  assignments,
  defineCommand,
  integerText,
  limitInput,
  limitOption,
  type CommandContext,
} from "../command.ts";
import type { Column } from "../output.ts";
import { formatSpan, parseBytes, parseDurationSeconds } from "../quantities.ts";
import { allocationSchema, resolveId, type AllocationAnswer } from "./resources.ts";

function gpusOf(allocation: AllocationAnswer): string {
  const wanted = allocation.request?.gpus;
  const given = allocation.gpus ?? [];
  const model = given[0]?.model ?? wanted?.model;
  return `${given.length > 0 ? given.length : (wanted?.count ?? "?")}${model ? ` ${model}` : ""}`;
}

const stateOf = (allocation: AllocationAnswer): string =>
  allocation.end_reason ? `${allocation.state} (${allocation.end_reason})` : allocation.state;

function listColumns(now: number): Column<AllocationAnswer>[] {
  return [
    { header: "id", value: (row) => row.id },
    { header: "name", value: (row) => row.name },
    { header: "state", value: stateOf },
    { header: "gpus", value: gpusOf },
    { header: "server", value: (row) => row.server_name },
    { header: "age", value: (row) => (row.created_at ? formatSpan(now - Date.parse(row.created_at)) : null) },
    {
      header: "lease left",
      value: (row) =>
        row.expires_at && row.state === "active" ? formatSpan(Date.parse(row.expires_at) - now) : null,
    },
    { header: "message", value: (row) => (row.message ? row.message.slice(0, 60) : null) },
  ];
}

const detailColumns: Column<AllocationAnswer>[] = [
  { header: "id", value: (row) => row.id },
  { header: "name", value: (row) => row.name },
  { header: "state", value: stateOf },
  { header: "message", value: (row) => row.message },
  { header: "tenant", value: (row) => row.tenant_id },
  { header: "gpus", value: gpusOf },
  { header: "gpu uuids", value: (row) => row.gpus?.map((gpu) => gpu.uuid).join(", ") },
  { header: "server", value: (row) => row.server_name },
  { header: "image", value: (row) => row.request?.container?.image },
  { header: "container", value: (row) => row.observed?.phase },
  { header: "exit code", value: (row) => row.observed?.exit_code },
  {
    header: "ports",
    value: (row) =>
      row.observed?.ports
        ?.map((port) => `${port.host_port ?? "?"}->${port.container_port ?? "?"}/${port.protocol ?? "tcp"}`)
        .join(", "),
  },
  { header: "created", value: (row) => row.created_at },
  { header: "active", value: (row) => row.active_at },
  { header: "expires", value: (row) => row.expires_at },
  { header: "ended", value: (row) => row.ended_at },
];

function show(context: CommandContext, allocation: AllocationAnswer): void {
  context.output.item(allocation, detailColumns);
}

const get = (api: ApiClient, id: string): Promise<AllocationAnswer> =>
  api.call("GET", `allocations/${id}`, allocationSchema);

const waitPollMs = 1000;

/** Polls until `done`; tells each new state and message once. Throws PlatformError `wait-timed-out`. */
async function waitFor(
  context: CommandContext,
  api: ApiClient,
  first: AllocationAnswer,
  timeoutSeconds: number,
  done: (allocation: AllocationAnswer) => boolean,
): Promise<AllocationAnswer> {
  const deadline = context.now() + timeoutSeconds * 1000;
  let allocation = first;
  let told = "";
  for (;;) {
    const line = [allocation.state, allocation.message].filter(Boolean).join(": ");
    if (line !== told) context.output.note(`${allocation.id} ${line}`);
    told = line;
    if (done(allocation)) return allocation;
    if (context.signal.aborted) {
      throw new PlatformError({
        code: "interrupted",
        kind: "internal",
        message: `you stopped waiting for ${allocation.id}; it goes on`,
      });
    }
    if (context.now() >= deadline) {
      throw new PlatformError({
        code: "wait-timed-out",
        kind: "unavailable",
        message: `${allocation.id} is still ${allocation.state} after ${timeoutSeconds} s`,
        hint: "It goes on without you: pbd alloc show tells how it is, pbd alloc release gives it up.",
      });
    }
    await context.sleep(waitPollMs);
    allocation = await get(api, allocation.id);
  }
}

/** The lines NAME=VALUE of a file; empty lines and those that begin with # are passed over. */
async function readSecretEnvironment(path: string): Promise<Record<string, string>> {
  const text = await readFile(path, "utf8").catch((cause: unknown) => {
    throw new PlatformError({
      code: "secret-env-file-unreadable",
      kind: "invalid",
      message: `${path} cannot be read`,
      hint: "It holds one NAME=VALUE a line.",
      cause,
    });
  });
  const record: Record<string, string> = {};
  for (const [index, line] of text.split(/\r?\n/).entries()) {
    if (line.trim() === "" || line.trimStart().startsWith("#")) continue;
    const at = line.indexOf("=");
    const name = line.slice(0, Math.max(0, at)).trim();
    if (name === "") {
      // The line may hold the secret: only its number is told.
      throw new PlatformError({
        code: "secret-env-file-invalid",
        kind: "invalid",
        message: `line ${index + 1} of ${path} is not NAME=VALUE`,
        hint: "It holds one NAME=VALUE a line; # begins a comment line.",
      });
    }
    record[name] = line.slice(at + 1);
  }
  return record;
}

const portText = z
  .array(z.string())
  .default([])
  .transform((ports, issues) =>
    ports.map((port) => {
      const match = /^(?:(\d{1,5}):)?(\d{1,5})(?:\/(tcp|udp))?$/.exec(port);
      if (match === null) {
        issues.addIssue({ code: "custom", message: `${JSON.stringify(port)}: write [HOST:]CONTAINER[/udp]` });
        return z.NEVER;
      }
      return {
        container_port: Number(match[2]),
        host_port: Number(match[1] ?? 0),
        protocol: match[3] ?? "tcp",
      };
    }),
  );

const flagNames = [
  "gpus",
  "model",
  "memory",
  "image",
  "env",
  "secretEnvFile",
  "port",
  "label",
  "command",
] as const;

const createInput = z
  .object({
    file: z.string().optional(),
    name: z.string().optional(),
    tenant: z.string().optional(),
    gpus: integerText(1, 64).optional(),
    model: z.string().optional(),
    memory: z.string().optional(),
    label: assignments,
    server: z.string().optional(),
    image: z.string().optional(),
    command: z.array(z.string()).default([]),
    env: assignments,
    secretEnvFile: z.string().optional(),
    port: portText,
    cpu: z
      .string()
      .regex(/^\d+(\.\d+)?$/, "a number of CPUs")
      .optional(),
    containerMemory: z.string().optional(),
    shm: z.string().optional(),
    pull: z.enum(["if_not_present", "always", "never"]).optional(),
    restart: z.enum(["never", "on_failure", "always"]).optional(),
    lease: z.string().optional(),
    priority: integerText(0, 100).optional(),
    idempotencyKey: z.string().optional(),
    wait: z.boolean().default(false),
    waitTimeout: z.string().default("5m"),
  })
  .refine((input) => input.file !== undefined || (input.gpus !== undefined && input.image !== undefined), {
    error: "--gpus and --image are needed, or the whole request with --file",
    path: ["gpus"],
  })
  .refine(
    (input) =>
      input.file === undefined ||
      flagNames.every((name) => {
        const value = input[name];
        return value === undefined || (typeof value === "object" && Object.keys(value).length === 0);
      }),
    { error: "the file holds the whole request; leave the other flags out", path: ["file"] },
  );

async function requestOf(context: CommandContext, input: z.output<typeof createInput>): Promise<unknown> {
  if (input.file !== undefined) {
    const text = input.file === "-" ? await context.readInput() : await readFile(input.file, "utf8");
    try {
      return JSON.parse(text);
    } catch (cause) {
      throw new PlatformError({
        code: "request-file-invalid",
        kind: "invalid",
        message: `${input.file} is not JSON`,
        hint: "It holds the body of POST /api/v1/allocations; /docs of the controller describes it.",
        cause,
      });
    }
  }
  const secretEnvironment =
    input.secretEnvFile === undefined ? undefined : await readSecretEnvironment(input.secretEnvFile);
  return {
    ...(input.name === undefined ? {} : { name: input.name }),
    gpus: {
      count: input.gpus,
      ...(input.model === undefined ? {} : { model: input.model }),
      ...(input.memory === undefined ? {} : { min_memory_bytes: parseBytes(input.memory) }),
      ...(Object.keys(input.label).length === 0 ? {} : { labels: input.label }),
    },
    container: {
      image: input.image,
      ...(input.command.length === 0 ? {} : { command: input.command }),
      ...(Object.keys(input.env).length === 0 ? {} : { environment: input.env }),
      ...(secretEnvironment === undefined ? {} : { secret_environment: secretEnvironment }),
      ...(input.port.length === 0 ? {} : { ports: input.port }),
      ...(input.cpu === undefined ? {} : { cpu_millicores: Math.round(Number(input.cpu) * 1000) }),
      ...(input.containerMemory === undefined ? {} : { memory_bytes: parseBytes(input.containerMemory) }),
      ...(input.shm === undefined ? {} : { shm_bytes: parseBytes(input.shm) }),
      ...(input.pull === undefined ? {} : { pull_policy: input.pull }),
      ...(input.restart === undefined ? {} : { restart_policy: input.restart }),
    },
    ...(input.lease === undefined ? {} : { lease_seconds: parseDurationSeconds(input.lease) }),
    ...(input.priority === undefined ? {} : { priority: input.priority }),
  };
}

export const allocCreate = defineCommand({
  path: ["alloc", "create"],
  description: "Ask for GPUs with a container",
  arguments: [
    { name: "command...", description: "replaces the image's entry point (after --)", optional: true },
  ],
  options: [
    { flags: "--gpus <count>", description: "whole GPUs on one server" },
    { flags: "--model <model>", description: "such as H100" },
    { flags: "--memory <size>", description: "memory of each GPU at least, such as 80Gi" },
    {
      flags: "--label <assignment>",
      description: "NAME=VALUE that GPU or server must have",
      repeatable: true,
    },
    { flags: "--server <server>", description: "on this server only (name or id; operators)" },
    { flags: "--image <image>", description: "container image" },
    {
      flags: "--env <assignment>",
      description: "NAME=VALUE in the container's environment",
      repeatable: true,
    },
    { flags: "--secret-env-file <file>", description: "NAME=VALUE lines kept secret" },
    { flags: "--port <port>", description: "[HOST:]CONTAINER[/udp] to publish", repeatable: true },
    { flags: "--cpu <count>", description: "CPUs of the container, such as 4 or 0.5" },
    { flags: "--container-memory <size>", description: "main memory of the container, such as 32Gi" },
    { flags: "--shm <size>", description: "size of /dev/shm" },
    { flags: "--pull <policy>", description: "if_not_present, always or never" },
    { flags: "--restart <policy>", description: "never, on_failure or always" },
    { flags: "--lease <duration>", description: "such as 8h; counted from the container's start" },
    { flags: "--priority <number>", description: "0 to 100, higher goes first; for operators and admins" },
    { flags: "--name <name>", description: "for people" },
    { flags: "--tenant <tenant>", description: "for this tenant (name or id; administrators)" },
    { flags: "-f, --file <file>", description: 'the whole request as JSON; "-": standard input' },
    { flags: "--idempotency-key <key>", description: "repeating with the same key does not ask twice" },
    { flags: "--wait", description: "until it is active; exit code 1 if it ends before" },
    { flags: "--wait-timeout <duration>", description: "how long --wait waits (default 5m)" },
  ],
  examples: [
    "pbd alloc create --gpus 2 --model H100 --image registry.example/train:1 --lease 8h --wait",
    "pbd alloc create --gpus 1 --image busybox -- sh -c 'nvidia-smi; sleep 60'",
    "pbd alloc create -f request.json",
  ],
  input: createInput,
  async run(context, input) {
    const body = z
      .looseObject({ gpus: z.looseObject({}).optional() })
      .safeParse(await requestOf(context, input));
    if (!body.success) {
      throw new PlatformError({
        code: "request-file-invalid",
        kind: "invalid",
        message: `${input.file ?? "the request"} is not a JSON object with gpus and container`,
        hint: "It holds the body of POST /api/v1/allocations.",
      });
    }
    const waitSeconds = parseDurationSeconds(input.waitTimeout);
    const api = await context.api();
    const request = {
      ...body.data,
      ...(input.tenant === undefined ? {} : { tenant_id: await resolveId(api, "tenant", input.tenant) }),
      ...(input.server === undefined
        ? {}
        : { gpus: { ...body.data.gpus, server_id: await resolveId(api, "server", input.server) } }),
    };
    const created = await api.call("POST", "allocations", allocationSchema, {
      body: request,
      // A key of its own makes it safe to send again when the answer was lost.
      headers: { "idempotency-key": input.idempotencyKey ?? crypto.randomUUID() },
    });
    if (!input.wait) {
      show(context, created);
      return;
    }
    const allocation = await waitFor(context, api, created, waitSeconds, ({ state }) =>
      ["active", "releasing", "ended"].includes(state),
    );
    show(context, allocation);
    if (allocation.state !== "active") {
      throw new PlatformError({
        code: "allocation-not-active",
        kind: "internal",
        message: `${allocation.id} ${stateOf(allocation)}: ${allocation.message ?? "no reason was given"}`,
        hint: `pbd alloc logs ${allocation.id} may tell more while it is releasing.`,
      });
    }
  },
});

export const allocList = defineCommand({
  path: ["alloc", "list"],
  description: "List allocations, newest first; ended ones only with --all",
  options: [
    { flags: "--state <state>", description: "only in this state; repeated: any of them", repeatable: true },
    { flags: "-a, --all", description: "ended ones too" },
    limitOption,
  ],
  input: z.object({
    state: z.array(z.string()).optional(),
    all: z.boolean().default(false),
    limit: limitInput,
  }),
  async run(context, { state, all, limit }) {
    const live = ["queued", "scheduled", "provisioning", "active", "releasing"];
    const api = await context.api();
    const query = { state: state ?? (all ? undefined : live) };
    context.output.list(
      await api.list("allocations", allocationSchema, { query, limit }),
      listColumns(context.now()),
    );
  },
});

const allocationArgument = { name: "allocation", description: "id or name" };

export const allocShow = defineCommand({
  path: ["alloc", "show"],
  description: "Show an allocation",
  arguments: [allocationArgument],
  input: z.object({ allocation: z.string() }),
  async run(context, input) {
    const api = await context.api();
    show(context, await get(api, await resolveId(api, "allocation", input.allocation)));
  },
});

export const allocLogs = defineCommand({
  path: ["alloc", "logs"],
  description: "Print the container's output",
  arguments: [allocationArgument],
  options: [
    { flags: "-f, --follow", description: "go on until the container ends" },
    { flags: "--tail <lines>", description: "only the last lines" },
    { flags: "--timestamps", description: "begin each line with its time" },
  ],
  input: z.object({
    allocation: z.string(),
    follow: z.boolean().default(false),
    tail: integerText(1, 100_000).optional(),
    timestamps: z.boolean().default(false),
  }),
  async run(context, { allocation, follow, tail, timestamps }) {
    const api = await context.api();
    const id = await resolveId(api, "allocation", allocation);
    const lines = await api.stream(`allocations/${id}/logs`, {
      accept: "text/plain",
      query: { follow, tail, timestamps },
      signal: context.signal,
    });
    try {
      for await (const chunk of lines) context.output.raw(chunk);
    } catch (cause) {
      if (context.signal.aborted) return;
      throw new PlatformError({
        code: "stream-broken",
        kind: "unavailable",
        message: "the connection ended in the middle of the logs",
        hint: "Run it again; --tail bounds what is repeated.",
        cause,
      });
    }
  },
});

export const allocRelease = defineCommand({
  path: ["alloc", "release"],
  description: "Give an allocation back",
  arguments: [allocationArgument],
  options: [
    { flags: "--wait", description: "until its GPUs were verified clean" },
    { flags: "--wait-timeout <duration>", description: "how long --wait waits (default 5m)" },
  ],
  input: z.object({
    allocation: z.string(),
    wait: z.boolean().default(false),
    waitTimeout: z.string().default("5m"),
  }),
  async run(context, input) {
    const waitSeconds = parseDurationSeconds(input.waitTimeout);
    const api = await context.api();
    const id = await resolveId(api, "allocation", input.allocation);
    const answer = await api.call("DELETE", `allocations/${id}`, allocationSchema.nullable());
    const first = answer ?? (await get(api, id));
    show(
      context,
      input.wait ? await waitFor(context, api, first, waitSeconds, ({ state }) => state === "ended") : first,
    );
  },
});

export const allocExtend = defineCommand({
  path: ["alloc", "extend"],
  description: "Lengthen the lease",
  arguments: [allocationArgument, { name: "duration", description: "such as 2h" }],
  input: z.object({ allocation: z.string(), duration: z.string() }),
  async run(context, input) {
    const seconds = parseDurationSeconds(input.duration);
    const api = await context.api();
    const id = await resolveId(api, "allocation", input.allocation);
    show(
      context,
      await api.call("POST", `allocations/${id}/extend`, allocationSchema, {
        body: { extend_seconds: seconds },
      }),
    );
  },
});
