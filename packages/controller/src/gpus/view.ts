import { z } from "@hono/zod-openapi";
import type { GpuSample } from "@palebluedot/shared/generated/palebluedot/agent/v1/agent.ts";
import { claimModeSchema } from "@palebluedot/shared/vocabulary.ts";
import { timeOf, timeSchema } from "../http/fields.ts";

/** A GPU and its readings as REST shows them. */

export const claimSchema = z
  .object({
    allocation_id: z.uuid(),
    tenant_id: z.uuid(),
    mode: claimModeSchema,
    claimed_at: timeSchema,
    usage_ended_at: timeSchema.nullable().openapi({
      description: "Set while the GPU is being cleaned behind the tenant",
    }),
  })
  .openapi("GpuClaim");

export const gpuHealthSchema = z.enum(["healthy", "degraded", "unhealthy", "unknown"]);

export const gpuSchema = z
  .object({
    id: z.uuid(),
    server_id: z.uuid(),
    server_name: z.string(),
    uuid: z.string().openapi({ description: "NVIDIA's own: GPU-…" }),
    index: z.number().int(),
    model: z.string(),
    serial: z.string().nullable(),
    pci_bus_id: z.string(),
    memory_bytes: z.number().int().nullable(),
    state: z.enum(["free", "claimed"]),
    claims: z.array(claimSchema),
    present: z.boolean().openapi({ description: "Its server still reports it" }),
    connected: z.boolean().openapi({ description: "Its server's agent has a session now" }),
    health: gpuHealthSchema,
    health_reason: z.string(),
    schedulable: z.boolean(),
    schedulable_reason: z.string(),
    mig_enabled: z.boolean().nullable(),
    labels: z.record(z.string(), z.string()),
    created_at: timeSchema,
    updated_at: timeSchema,
  })
  .openapi("Gpu");

export const gpuDetailSchema = gpuSchema
  .extend({ inventory: z.looseObject({}).openapi({ description: "What nvidia-smi told; null: it did not" }) })
  .openapi("GpuDetail");

const reading = z.number().nullable();

/** Null is "the device did not tell", never 0. */
export const sampleSchema = z
  .object({
    time: timeSchema,
    utilization_ratio: reading,
    memory_utilization_ratio: reading,
    memory_used_bytes: reading,
    temperature_celsius: reading,
    memory_temperature_celsius: reading,
    power_draw_watts: reading,
    power_limit_watts: reading,
    sm_clock_mhz: reading,
    memory_clock_mhz: reading,
    pcie_generation: reading,
    pcie_width: reading,
    clock_event_reasons: reading.openapi({ description: "nvidia-smi's bit mask" }),
    ecc_corrected_volatile: reading,
    ecc_uncorrected_volatile: reading,
    fan_speed_ratio: reading,
    performance_state: z.string().nullable(),
  })
  .openapi("GpuSample");

/** Float32 on the wire and in the ring: seven digits are real, the rest is noise of the conversion. */
const rounded = (value: number | undefined): number | null =>
  value === undefined ? null : Number(value.toPrecision(6));

export function sampleView(sample: GpuSample): z.infer<typeof sampleSchema> {
  return {
    time: new Date(sample.timeUnixMs).toISOString(),
    utilization_ratio: rounded(sample.utilizationRatio),
    memory_utilization_ratio: rounded(sample.memoryUtilizationRatio),
    memory_used_bytes: sample.memoryUsedBytes ?? null,
    temperature_celsius: rounded(sample.temperatureCelsius),
    memory_temperature_celsius: rounded(sample.memoryTemperatureCelsius),
    power_draw_watts: rounded(sample.powerDrawWatts),
    power_limit_watts: rounded(sample.powerLimitWatts),
    sm_clock_mhz: sample.smClockMhz ?? null,
    memory_clock_mhz: sample.memoryClockMhz ?? null,
    pcie_generation: sample.pcieGeneration ?? null,
    pcie_width: sample.pcieWidth ?? null,
    clock_event_reasons: sample.clockEventReasons ?? null,
    ecc_corrected_volatile: sample.eccCorrectedVolatile ?? null,
    ecc_uncorrected_volatile: sample.eccUncorrectedVolatile ?? null,
    fan_speed_ratio: rounded(sample.fanSpeedRatio),
    performance_state: sample.performanceState ?? null,
  };
}

interface StoredClaim {
  readonly allocation_id: string;
  readonly tenant_id: string;
  readonly mode: z.infer<typeof claimModeSchema>;
  /** As PostgreSQL writes times into JSON. */
  readonly claimed_at: string;
  readonly usage_ended_at: string | null;
}

export interface GpuRow {
  readonly id: string;
  readonly server_id: string;
  readonly server_name: string;
  readonly session_replica: string | null;
  readonly uuid: string;
  readonly index: number;
  readonly model: string;
  readonly serial: string | null;
  readonly pci_bus_id: string;
  readonly memory_bytes: string | number | null;
  readonly labels: Record<string, string>;
  readonly schedulable: boolean;
  readonly schedulable_reason: string;
  readonly present: boolean;
  readonly health: z.infer<typeof gpuHealthSchema>;
  readonly health_reason: string;
  readonly mig_enabled: boolean | null;
  readonly created_at: Date;
  readonly updated_at: Date;
  readonly claims: StoredClaim[] | null;
}

export function gpuView(row: GpuRow): z.infer<typeof gpuSchema> {
  const claims = (row.claims ?? []).map((claim) => ({
    allocation_id: claim.allocation_id,
    tenant_id: claim.tenant_id,
    mode: claim.mode,
    claimed_at: new Date(claim.claimed_at).toISOString(),
    usage_ended_at: claim.usage_ended_at === null ? null : new Date(claim.usage_ended_at).toISOString(),
  }));
  return {
    id: row.id,
    server_id: row.server_id,
    server_name: row.server_name,
    uuid: row.uuid,
    index: row.index,
    model: row.model,
    serial: row.serial,
    pci_bus_id: row.pci_bus_id,
    memory_bytes: row.memory_bytes === null ? null : Number(row.memory_bytes),
    state: claims.length === 0 ? "free" : "claimed",
    claims,
    present: row.present,
    connected: row.session_replica !== null,
    health: row.health,
    health_reason: row.health_reason,
    schedulable: row.schedulable,
    schedulable_reason: row.schedulable_reason,
    mig_enabled: row.mig_enabled,
    labels: row.labels,
    created_at: timeOf(row.created_at),
    updated_at: timeOf(row.updated_at),
  };
}
