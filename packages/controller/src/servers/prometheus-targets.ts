import type { Sql } from "postgres";
import { z } from "zod";

/**
 * Where Prometheus finds the agents (HTTP service discovery): one group per server whose agent serves
 * metrics. The address is the one that the agent's session comes from: an address that an agent names itself could
 * send Prometheus anywhere. The label `metrics-address` (host or host:port) overrides it for hosts behind address
 * translation.
 */
export interface TargetGroup {
  readonly targets: string[];
  readonly labels: Record<string, string>;
}

export const overrideLabel = "metrics-address";

const endpointSchema = z.object({
  metricsPort: z.number().int().min(1).max(65_535),
  metricsTls: z.boolean().nullish(),
});

interface TargetRow {
  readonly id: string;
  readonly name: string;
  readonly site: string | null;
  readonly rack: string | null;
  readonly labels: Record<string, string>;
  readonly session_address: string | null;
  readonly endpoint: unknown;
}

export async function prometheusTargets(sql: Sql): Promise<TargetGroup[]> {
  const rows = await sql<TargetRow[]>`
    select id, name, site, rack, labels, session_address, jsonb_build_object(
      'metricsPort', inventory->'host'->'metricsPort', 'metricsTls', inventory->'host'->'metricsTls') as endpoint
    from servers
    where state not in ('pending', 'retired') and inventory->'host'->'metricsPort' is not null
    order by id`;
  return rows.flatMap((row) => {
    const endpoint = endpointSchema.safeParse(row.endpoint);
    if (!endpoint.success) return [];
    const target = targetOf(endpoint.data.metricsPort, row.session_address, row.labels[overrideLabel]);
    if (target === undefined) return [];
    return [
      {
        targets: [target],
        labels: {
          __scheme__: endpoint.data.metricsTls === true ? "https" : "http",
          server_id: row.id,
          server: row.name,
          ...(row.site === null ? {} : { site: row.site }),
          ...(row.rack === null ? {} : { rack: row.rack }),
          ...metaLabels(row.labels),
        },
      },
    ];
  });
}

function targetOf(
  port: number,
  sessionAddress: string | null,
  override: string | undefined,
): string | undefined {
  if (override !== undefined && override !== "") {
    return /:\d+$/.test(override) ? override : `${override}:${port}`;
  }
  if (sessionAddress === null) return undefined;
  return sessionAddress.includes(":") ? `[${sessionAddress}]:${port}` : `${sessionAddress}:${port}`;
}

/** Labels for relabelling only: Prometheus drops what begins with two underscores. */
function metaLabels(labels: Readonly<Record<string, string>>): Record<string, string> {
  return Object.fromEntries(
    Object.entries(labels).map(([key, value]) => [
      `__meta_palebluedot_label_${key.replaceAll(/[^a-zA-Z0-9_]/g, "_")}`,
      value,
    ]),
  );
}
