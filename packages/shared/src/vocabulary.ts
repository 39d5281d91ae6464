import { z } from "zod";

/** States and their words: the API, the database and the agent link use exactly these. */

export const serverStates = [
  "pending",
  "verifying",
  "available",
  "deploying",
  "in_use",
  "cleaning",
  "maintenance",
  "failed",
  "retired",
] as const;
export const serverStateSchema = z.enum(serverStates);
export type ServerState = z.infer<typeof serverStateSchema>;

export const serverPools = ["container", "bare_metal"] as const;
export const serverPoolSchema = z.enum(serverPools);
export type ServerPool = z.infer<typeof serverPoolSchema>;

export const allocationStates = [
  "queued",
  "scheduled",
  "provisioning",
  "active",
  "releasing",
  "ended",
] as const;
export const allocationStateSchema = z.enum(allocationStates);
export type AllocationState = z.infer<typeof allocationStateSchema>;

export const endReasons = ["released", "expired", "preempted", "failed", "cancelled"] as const;
export const endReasonSchema = z.enum(endReasons);
export type EndReason = z.infer<typeof endReasonSchema>;

export const claimModes = ["whole", "mig", "share"] as const;
export const claimModeSchema = z.enum(claimModes);
export type ClaimMode = z.infer<typeof claimModeSchema>;

/** Label keys and values as in Kubernetes, without the prefix rules. */
export const labelsSchema = z
  .record(
    z.string().regex(/^[a-zA-Z0-9]([a-zA-Z0-9._/-]{0,61}[a-zA-Z0-9])?$/),
    z
      .string()
      .max(255)
      .regex(/^[^\p{Cc}]*$/u),
  )
  .refine((labels) => Object.keys(labels).length <= 64, "at most 64 labels");
