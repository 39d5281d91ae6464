import { parseList, parseTopology, type GpuTopology } from "./listings.ts";
import { pciNumaNode } from "./pci-devices.ts";
import type { GpuReading, MigReading, PlacementFacts } from "./reading.ts";
import type { SmiRunner } from "./smi-runner.ts";

export interface Placement {
  readonly placement: ReadonlyMap<string, PlacementFacts>;
  /** Devices completed with UUID and profile, for GPUs that have any. */
  readonly migDevices: ReadonlyMap<string, MigReading[]>;
}

/**
 * What the XML document lacks: NUMA node (sysfs, else topo -m), NVLink peers (topo -m), and the UUIDs of
 * MIG devices (-L, joined by index). What cannot be read stays unknown; nothing here fails.
 */
export async function readPlacement(options: {
  readonly runner: SmiRunner;
  readonly sysfsRoot: string;
  readonly gpus: readonly GpuReading[];
  /** Topology changes only with the set of GPUs, and costs a run. */
  readonly newcomers: boolean;
  readonly queryDeadlineMs: number;
}): Promise<Placement> {
  const { runner, gpus } = options;
  const placement = new Map<string, PlacementFacts>();
  const migDevices = new Map<string, MigReading[]>();
  const topology = options.newcomers ? await readTopology(runner, options.queryDeadlineMs) : [];
  for (const gpu of gpus) {
    if (gpu.uuid === undefined || !options.newcomers) continue;
    const row = topology.find((candidate) => candidate.index === gpu.index);
    placement.set(gpu.uuid, {
      numaNode: (await pciNumaNode(options.sysfsRoot, gpu.pciBusId ?? "")) ?? row?.numaNode,
      nvlinkCount: row?.nvlinkCount,
      nvlinkPeers: row?.nvlinkPeers
        .map((index) => gpus.find((peer) => peer.index === index)?.uuid)
        .filter((uuid) => uuid !== undefined),
    });
  }
  if (gpus.some((gpu) => (gpu.migDevices?.length ?? 0) > 0)) {
    const result = await runner.run("list", ["-L"], options.queryDeadlineMs);
    const listed = result.kind === "ok" ? parseList(result.stdout) : [];
    for (const gpu of gpus) {
      if (gpu.uuid === undefined || gpu.migDevices === undefined || gpu.migDevices.length === 0) continue;
      const names = listed.find((candidate) => candidate.uuid === gpu.uuid)?.migDevices ?? [];
      migDevices.set(
        gpu.uuid,
        gpu.migDevices.map((device) => {
          const name = names.find((candidate) => candidate.index === device.index);
          return { ...device, uuid: name?.uuid, profile: name?.profile };
        }),
      );
    }
  }
  return { placement, migDevices };
}

async function readTopology(runner: SmiRunner, deadlineMs: number): Promise<GpuTopology[]> {
  const result = await runner.run("topology", ["topo", "-m"], deadlineMs);
  return result.kind === "ok" ? parseTopology(result.stdout) : [];
}
