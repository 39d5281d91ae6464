import { createHash } from "node:crypto";
import { PlatformError } from "@palebluedot/shared/errors.ts";
import {
  Condition_Status,
  Inventory,
  type GpuInventory,
  type HostInventory,
} from "@palebluedot/shared/generated/palebluedot/agent/v1/agent.ts";
import { z } from "zod";

/** A condition as `servers.conditions` holds it. */
export interface StoredCondition {
  readonly status: "ok" | "degraded" | "failed" | "unknown" | "absent";
  readonly reason: string;
  readonly message: string;
  /** RFC 3339 */
  readonly since: string;
}

export interface CleanInventory {
  readonly sha256: string;
  readonly host: HostInventory | undefined;
  readonly gpus: readonly GpuInventory[];
  readonly conditions: Readonly<Record<string, StoredCondition>>;
}

/** Set by the controller itself; an agent that sends them is ignored. */
export const reservedConditions = ["unreachable", "draining", "unhealthy", "gpu-identity"] as const;

const maxStringLength = 512;
/** Four times what the largest hosts hold. */
export const maxGpusPerServer = 64;
const invisible = /[\p{Cc}\p{Cf}\p{Zl}\p{Zp}]/gu;

const bounds = z.object({
  gpus: z
    .array(
      z.object({
        uuid: z.string().regex(/^[\x21-\x7e]{4,96}$/),
        index: z.number().int().max(1023),
        model: z.string().min(1),
        pciBusId: z.string().min(1).max(64),
        memoryTotalBytes: z.number().int().nonnegative().max(Number.MAX_SAFE_INTEGER).optional(),
        nvlinkPeers: z.array(z.string()).max(128),
        migDevices: z.array(z.unknown()).max(64),
      }),
    )
    .max(maxGpusPerServer)
    .refine((gpus) => new Set(gpus.map((gpu) => gpu.uuid)).size === gpus.length, "a GPU is listed twice"),
  conditions: z.array(z.object({ component: z.string().regex(/^[a-z0-9][a-z0-9.-]{0,63}$/) })).max(512),
  host: z
    .object({
      disks: z.array(z.unknown()).max(512),
      networkInterfaces: z.array(z.object({ addresses: z.array(z.string()).max(64) })).max(512),
    })
    .optional(),
});

const statusWords: Readonly<Record<number, StoredCondition["status"]>> = {
  [Condition_Status.OK]: "ok",
  [Condition_Status.DEGRADED]: "degraded",
  [Condition_Status.FAILED]: "failed",
  [Condition_Status.UNKNOWN]: "unknown",
  [Condition_Status.ABSENT]: "absent",
};

/**
 * An inventory as it may be stored: strings without invisible characters and of bounded length, lists
 * bounded. The wire types are checked by the decoder already. Throws PlatformError `inventory-invalid`.
 */
export function cleanInventory(raw: Inventory): CleanInventory {
  const sha256 = createHash("sha256").update(Inventory.encode(raw).finish()).digest("hex");
  const inventory = cleanStrings(raw) as Inventory;
  const parsed = bounds.safeParse(inventory);
  if (!parsed.success) {
    throw new PlatformError({
      code: "inventory-invalid",
      kind: "invalid",
      message: z.prettifyError(parsed.error).slice(0, 1024),
    });
  }
  const conditions: Record<string, StoredCondition> = {};
  for (const condition of inventory.conditions) {
    if ((reservedConditions as readonly string[]).includes(condition.component)) continue;
    conditions[condition.component] = {
      status: statusWords[condition.status] ?? "unknown",
      reason: condition.reason,
      message: condition.message,
      since: isoTime(condition.sinceUnixMs),
    };
  }
  return { sha256, host: inventory.host, gpus: inventory.gpus, conditions };
}

function isoTime(unixMs: number): string {
  // Beyond this JavaScript has no date, and PostgreSQL's JSON would carry null.
  return new Date(Math.min(Math.max(0, unixMs), 253_402_300_799_000)).toISOString();
}

/** Every string of a decoded message made storable and printable: no control characters, bounded, well formed. */
export function cleanStrings(value: unknown): unknown {
  if (typeof value === "string") {
    return value.replace(invisible, " ").slice(0, maxStringLength).trim().toWellFormed();
  }
  if (Array.isArray(value)) return value.map(cleanStrings);
  // Bytes stay bytes: taken apart by their indices they would be an object of numbers.
  if (typeof value !== "object" || value === null || value instanceof Uint8Array) return value;
  return Object.fromEntries(Object.entries(value).map(([key, member]) => [key, cleanStrings(member)]));
}
