import { PlatformError } from "@palebluedot/shared/errors.ts";
import { z } from "zod";
import type { ApiClient } from "../api.ts";

/** What the commands read of the API's answers. Lenient: a newer controller may send more. */
const text = z.string().nullish();
const count = z.number().nullish();
const named = z.looseObject({ id: z.string(), name: text });
const listed = named.extend({ state: text });

export const serverSchema = named.extend({
  state: text,
  state_message: text,
  pool: text,
  connected: z.boolean().nullish(),
  draining: z.boolean().nullish(),
  gpu_count: count,
  gpu_claimed_count: count,
  gpu_models: z.array(z.string()).nullish(),
  site: text,
  rack: text,
  rack_unit: count,
  serial: text,
  bmc_address: text,
  agent_version: text,
  labels: z.record(z.string(), z.string()).nullish(),
  conditions: z.array(z.looseObject({ name: z.string(), status: text, message: text })).nullish(),
});

export const gpuSchema = z.looseObject({
  id: z.string(),
  uuid: text,
  index: count,
  model: text,
  server_name: text,
  server_id: text,
  memory_bytes: count,
  state: text,
  health: text,
  health_reason: text,
  schedulable: z.boolean().nullish(),
  schedulable_reason: text,
  serial: text,
  pci_bus_id: text,
  mig_enabled: z.boolean().nullish(),
});

export const allocationSchema = named.extend({
  state: z.string(),
  end_reason: text,
  message: text,
  tenant_id: text,
  server_name: text,
  lease_seconds: count,
  expires_at: text,
  created_at: text,
  active_at: text,
  ended_at: text,
  gpus: z.array(z.looseObject({ index: count, model: text, uuid: text })).nullish(),
  request: z
    .looseObject({
      gpus: z.looseObject({ count, model: text }).nullish(),
      container: z.looseObject({ image: text }).nullish(),
    })
    .nullish(),
  observed: z
    .looseObject({
      phase: text,
      message: text,
      exit_code: count,
      ports: z.array(z.looseObject({ container_port: count, host_port: count, protocol: text })).nullish(),
    })
    .nullish(),
});
export type AllocationAnswer = z.output<typeof allocationSchema>;

export const joinTokenSchema = named.extend({
  token: text,
  ca_fingerprint: text,
  server_id: text,
  auto_approve: z.boolean().nullish(),
  max_uses: count,
  uses: count,
  pool: text,
  expires_at: text,
  revoked_at: text,
});

export const tenantSchema = named.extend({ created_at: text, disabled_at: text });

export const tokenSchema = named.extend({
  token: text,
  tenant_id: text,
  role: text,
  created_at: text,
  expires_at: text,
  revoked_at: text,
});

export const eventSchema = z.looseObject({
  seq: z.number(),
  type: z.string(),
  severity: text,
  actor: text,
  message: text,
  occurred_at: text,
  server_id: text,
  allocation_id: text,
});

export const capacitySchema = z.looseObject({
  model: text,
  memory_bytes: count,
  total_count: count,
  free_count: count,
  claimed_count: count,
  unavailable_count: count,
  largest_free_count: count,
});

const uuidPattern = /^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$/i;
/** Lists are searched this far for a name. */
const searchItems = 5000;

/**
 * The id of something given by id or by name. Throws PlatformError `<noun>-not-found`, or
 * `<noun>-ambiguous` when several have the name.
 */
export async function resolveId(
  api: ApiClient,
  noun: "server" | "allocation" | "tenant",
  given: string,
): Promise<string> {
  if (uuidPattern.test(given)) return given.toLowerCase();
  const items = await api.list(`${noun}s`, listed, {
    limit: searchItems,
    ...(noun === "server"
      ? { query: { q: given } }
      : noun === "allocation"
        ? { query: { name: given } }
        : {}),
  });
  const sameName = items.filter((item) => item.name === given);
  // Names come back: who gives one means what runs under it now, not what ended long ago.
  const live = sameName.filter((item) => item.state !== "ended");
  const matches = live.length === 1 ? live : sameName;
  const [match] = matches;
  if (match !== undefined && matches.length === 1) return match.id;
  throw new PlatformError(
    matches.length === 0
      ? {
          code: `${noun}-not-found`,
          kind: "not-found",
          message: `there is no ${noun} named ${JSON.stringify(given)}`,
          hint: "Give its name or its whole id, as the list shows it.",
        }
      : {
          code: `${noun}-ambiguous`,
          kind: "conflict",
          message: `${matches.length} ${noun}s are named ${JSON.stringify(given)}`,
          hint: `Give the id: ${matches.map((item) => item.id).join(", ")}`,
        },
  );
}
