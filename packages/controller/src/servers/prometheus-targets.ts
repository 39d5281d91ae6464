import type { Sql } from "postgres";
import { z } from "zod";

/**
 * Where Prometheus finds the agents (HTTP service discovery): one group per server whose agent serves
 * metrics. The address is the host's own, as its inventory tells; the label `metrics-address` (host or
 * host:port) overrides it for hosts behind address translation.
 */
export interface TargetGroup {
  readonly targets: string[];
  readonly labels: Record<string, string>;
}

export const overrideLabel = "metrics-address";

// Bridges and tunnels of container engines: reachable from the host itself only.
const virtualInterface = /^(lo|docker|veth|br-|virbr|cni|flannel|cali|tunl|kube|podman)/;

const endpointSchema = z.object({
  metricsPort: z.number().int().min(1).max(65_535),
  metricsTls: z.boolean().nullish(),
  hostname: z.string().catch(""),
  networkInterfaces: z
    .array(
      z.object({
        name: z.string(),
        addresses: z.array(z.string()).catch([]),
        operationalState: z.string().catch(""),
      }),
    )
    .catch([]),
});

interface TargetRow {
  readonly id: string;
  readonly name: string;
  readonly site: string | null;
  readonly rack: string | null;
  readonly labels: Record<string, string>;
  readonly endpoint: unknown;
}

export async function prometheusTargets(sql: Sql): Promise<TargetGroup[]> {
  const rows = await sql<TargetRow[]>`
    select id, name, site, rack, labels, jsonb_build_object(
      'metricsPort', inventory->'host'->'metricsPort', 'metricsTls', inventory->'host'->'metricsTls',
      'hostname', inventory->'host'->'hostname',
      'networkInterfaces', inventory->'host'->'networkInterfaces') as endpoint
    from servers
    where state not in ('pending', 'retired') and inventory->'host'->'metricsPort' is not null
    order by id`;
  return rows.flatMap((row) => {
    const endpoint = endpointSchema.safeParse(row.endpoint);
    if (!endpoint.success) return [];
    const target = targetOf(endpoint.data, row.labels[overrideLabel]);
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
  endpoint: z.infer<typeof endpointSchema>,
  override: string | undefined,
): string | undefined {
  if (override !== undefined && override !== "") {
    return /:\d+$/.test(override) ? override : `${override}:${endpoint.metricsPort}`;
  }
  const addresses = endpoint.networkInterfaces
    .filter((nic) => !virtualInterface.test(nic.name))
    .sort((a, b) => Number(b.operationalState === "up") - Number(a.operationalState === "up"))
    .flatMap((nic) => nic.addresses.map((address) => address.replace(/\/\d+$/, "")));
  const ipv4 = addresses.find(
    (address) => /^\d+(\.\d+){3}$/.test(address) && !/^(127|169\.254)\./.test(address),
  );
  const ipv6 = addresses.find((address) => address.includes(":") && !/^(fe80|::1$)/i.test(address));
  if (ipv4 !== undefined) return `${ipv4}:${endpoint.metricsPort}`;
  if (ipv6 !== undefined) return `[${ipv6}]:${endpoint.metricsPort}`;
  return endpoint.hostname === "" ? undefined : `${endpoint.hostname}:${endpoint.metricsPort}`;
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
