import { z } from "zod";
import { isImageReference } from "@palebluedot/shared/image-reference.ts";
import { allocationStateSchema, endReasonSchema, labelsSchema } from "@palebluedot/shared/vocabulary.ts";

/**
 * What a tenant asks for (`POST /api/v1/allocations`) and what it gets back. Unknown members are refused,
 * every string and list is bounded, and control characters are refused where no shell needs them.
 */

export const maxGpusPerAllocation = 64;
export const leaseSecondsDefault = 86_400;
export const leaseSecondsMin = 60;
export const leaseSecondsMax = 30 * 86_400;

const controlFree = /^[^\p{Cc}\p{Cs}]*$/u;
// Commands and values of variables may hold tabs and line breaks, never NUL or escape sequences.
const textual = /^(?:[^\p{Cc}\p{Cs}]|[\t\n\r])*$/u;

const word = (max: number): z.ZodString =>
  z.string().min(1).max(max).regex(controlFree, "no control characters");
const text = (max: number): z.ZodString => z.string().max(max).regex(textual, "no control characters");

const environmentName = /^[A-Za-z_][A-Za-z0-9_]*$/;
const environmentSchema = z
  .record(z.string().max(256).regex(environmentName), text(32_768))
  .refine((variables) => Object.keys(variables).length <= 256, "at most 256 variables");

const absolutePath = z
  .string()
  .min(2)
  .max(1024)
  .regex(controlFree, "no control characters")
  .regex(/^\//, "an absolute path")
  .refine((path) => !path.split("/").includes(".."), "no .. in the path");

const ulimitNames = [
  "core",
  "cpu",
  "data",
  "fsize",
  "locks",
  "memlock",
  "msgqueue",
  "nice",
  "nofile",
  "nproc",
  "rss",
  "rtprio",
  "rttime",
  "sigpending",
  "stack",
] as const;

const portSchema = z.strictObject({
  container_port: z.int().min(1).max(65_535),
  /** 0: the engine picks one. */
  host_port: z.int().min(0).max(65_535).default(0),
  protocol: z.enum(["tcp", "udp"]).default("tcp"),
});

export const containerRequestSchema = z.strictObject({
  image: z
    .string()
    .min(1)
    .max(512)
    .refine(isImageReference, "an image reference such as registry.example/team/image:tag"),
  /** Replaces the image's entry point. */
  command: z.array(text(32_768)).max(256).default([]),
  args: z.array(text(32_768)).max(1024).default([]),
  environment: environmentSchema.default({}),
  /** Values are encrypted at rest and never shown again. */
  secret_environment: environmentSchema.default({}),
  working_directory: absolutePath.or(z.literal("/")).optional(),
  user: z
    .string()
    .max(64)
    .regex(/^[a-zA-Z0-9_][a-zA-Z0-9_.-]*(:[a-zA-Z0-9_][a-zA-Z0-9_.-]*)?$/, "user or user:group")
    .optional(),
  cpu_millicores: z.int().min(10).max(1_024_000).optional(),
  memory_bytes: z
    .int()
    .min(6 * 1024 * 1024)
    .max(2 ** 50)
    .optional(),
  pids: z.int().min(1).max(4_194_304).optional(),
  shm_bytes: z
    .int()
    .min(4096)
    .max(2 ** 45)
    .optional(),
  ulimits: z
    .array(
      z
        .strictObject({
          name: z.enum(ulimitNames),
          soft: z.int().min(-1).max(Number.MAX_SAFE_INTEGER),
          hard: z.int().min(-1).max(Number.MAX_SAFE_INTEGER),
        })
        .refine(
          (limit) => limit.hard === -1 || (limit.soft !== -1 && limit.soft <= limit.hard),
          "soft above hard",
        ),
    )
    .max(ulimitNames.length)
    .refine(
      (limits) => new Set(limits.map((limit) => limit.name)).size === limits.length,
      "a limit is named twice",
    )
    .default([]),
  ports: z
    .array(portSchema)
    .max(64)
    .refine(
      (ports) =>
        new Set(ports.map((port) => `${port.container_port}/${port.protocol}`)).size === ports.length,
      "a container port is published twice",
    )
    .default([]),
  volumes: z
    .array(
      z.strictObject({
        name: z.string().regex(/^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$/, "lower case, digits and -"),
        mount_path: absolutePath,
        read_only: z.boolean().default(false),
        /** Only so that the agent's policy can refuse it by name; volumes live on a managed path. */
        host_path: z.string().max(1024).regex(controlFree, "no control characters").optional(),
      }),
    )
    .max(32)
    .refine(
      (volumes) =>
        new Set(volumes.map((volume) => volume.name)).size === volumes.length &&
        new Set(volumes.map((volume) => volume.mount_path)).size === volumes.length,
      "a volume's name or mount path appears twice",
    )
    .default([]),
  added_capabilities: z
    .array(z.string().regex(/^[A-Z][A-Z_]{1,39}$/, "such as IPC_LOCK"))
    .max(32)
    .default([]),
  restart_policy: z.enum(["never", "on_failure", "always"]).default("never"),
  max_restarts: z.int().min(0).max(1000).default(0),
  stop_grace_seconds: z.int().min(0).max(600).default(10),
  registry: z
    .strictObject({
      server: z.string().max(255).regex(controlFree, "no control characters").default(""),
      username: word(255),
      password: z.string().min(1).max(8192).regex(controlFree, "no control characters"),
    })
    .optional(),
  pull_policy: z.enum(["if_not_present", "always", "never"]).default("if_not_present"),
  // Asked for here, refused by the agent's policy with its own reason.
  privileged: z.boolean().default(false),
  host_network: z.boolean().default(false),
  host_pid: z.boolean().default(false),
  host_ipc: z.boolean().default(false),
  host_devices: z.array(absolutePath).max(64).default([]),
});

export const gpuRequestSchema = z.strictObject({
  count: z
    .int()
    .min(1, `count is a number of whole GPUs on one server, 1 to ${maxGpusPerAllocation}`)
    .max(maxGpusPerAllocation, `count is a number of whole GPUs on one server, 1 to ${maxGpusPerAllocation}`),
  /** As nvidia-smi names it ("NVIDIA H100 80GB HBM3") or a part of that between spaces ("H100"), any case. */
  model: word(128).optional(),
  min_memory_bytes: z
    .int()
    .min(1)
    .max(2 ** 50)
    .optional(),
  /** Every one must be on the GPU, or on its server. */
  labels: labelsSchema.default({}),
  server_id: z.uuid().optional(),
});

export const allocationRequestSchema = z.strictObject({
  name: z.string().max(128).regex(controlFree, "no control characters").default(""),
  /** For administrators, who belong to no tenant. */
  tenant_id: z.uuid().optional(),
  gpus: gpuRequestSchema,
  container: containerRequestSchema.refine(
    (container) =>
      Object.keys(container.environment).every((name) => !(name in container.secret_environment)),
    { message: "a variable is in environment and in secret_environment", path: ["secret_environment"] },
  ),
  /** Counted from the start of the container. */
  lease_seconds: z.int().min(leaseSecondsMin).max(leaseSecondsMax).default(leaseSecondsDefault),
  /** Higher goes first. */
  priority: z.int().min(0).max(100).default(0),
});

export type AllocationRequest = z.infer<typeof allocationRequestSchema>;
export type ContainerRequest = z.infer<typeof containerRequestSchema>;
export type GpuRequest = z.infer<typeof gpuRequestSchema>;

/** `POST /api/v1/allocations/{id}/extend` */
export const allocationExtensionSchema = z.strictObject({
  /** Added to the lease; the whole lease stays within 30 days. */
  extend_seconds: z.int().min(1).max(leaseSecondsMax),
});

/** The request as it is stored and shown: names of secrets, never their values. */
export const storedRequestSchema = z.object({
  gpus: gpuRequestSchema,
  container: containerRequestSchema.omit({ secret_environment: true, registry: true }).extend({
    secret_environment_names: z.array(z.string()).default([]),
    registry: z.object({ server: z.string(), username: z.string() }).optional(),
  }),
});
export type StoredRequest = z.infer<typeof storedRequestSchema>;

/** What the agent last told of the workload. */
export const observedWorkloadSchema = z.object({
  /** Lower case, as in the agent link: accepted, pulling, creating, running, exited, failed, ... */
  phase: z.string().optional(),
  reason: z.string().optional(),
  message: z.string().optional(),
  container_id: z.string().optional(),
  exit_code: z.int().optional(),
  started_at: z.string().optional(),
  restart_count: z.int().optional(),
  oom_killed: z.boolean().optional(),
  ports: z.array(z.object({ container_port: z.int(), host_port: z.int(), protocol: z.string() })).optional(),
  /** What still holds a GPU after the release. */
  holders: z
    .array(
      z.object({
        gpu_uuid: z.string(),
        pid: z.int(),
        process_name: z.string(),
        memory_used_bytes: z.number(),
      }),
    )
    .optional(),
});
export type ObservedWorkload = z.infer<typeof observedWorkloadSchema>;

/** An allocation as the API shows it. */
export const allocationSchema = z.object({
  id: z.uuid(),
  tenant_id: z.uuid(),
  name: z.string(),
  state: allocationStateSchema,
  state_since: z.string(),
  end_reason: endReasonSchema.nullable(),
  /** Why it waits or failed, in words. */
  message: z.string(),
  request: storedRequestSchema,
  priority: z.int(),
  lease_seconds: z.int(),
  expires_at: z.string().nullable(),
  server_id: z.uuid().nullable(),
  server_name: z.string().nullable(),
  gpus: z.array(z.object({ id: z.uuid(), uuid: z.string(), index: z.int(), model: z.string() })),
  observed: observedWorkloadSchema,
  created_at: z.string(),
  scheduled_at: z.string().nullable(),
  active_at: z.string().nullable(),
  releasing_at: z.string().nullable(),
  ended_at: z.string().nullable(),
});
export type Allocation = z.infer<typeof allocationSchema>;
