/** The fields of `--query-compute-apps` and the two other per-GPU lists that name processes or pages. */
import { csvTimestamp } from "./fields.ts";
import type { GpuReading } from "./readings.ts";

type Process = GpuReading["processes"][number];

export interface RowField<Row> {
  readonly name: string;
  readonly aliases: readonly string[];
  readonly unit: string | undefined;
  readonly value: (reading: GpuReading, row: Row) => string | number;
}

function common<Row>(): RowField<Row>[] {
  return [
    { name: "timestamp", aliases: [], unit: undefined, value: (r) => csvTimestamp(r.atMs) },
    { name: "gpu_name", aliases: [], unit: undefined, value: (r) => r.model.name },
    { name: "gpu_bus_id", aliases: [], unit: undefined, value: (r) => r.identity.pciBusId },
    { name: "gpu_serial", aliases: [], unit: undefined, value: (r) => r.identity.serial },
    { name: "gpu_uuid", aliases: [], unit: undefined, value: (r) => r.identity.uuid },
  ];
}

export const computeAppFields: readonly RowField<Process>[] = [
  ...common<Process>(),
  { name: "pid", aliases: [], unit: undefined, value: (_, p) => p.pid },
  { name: "process_name", aliases: ["name"], unit: undefined, value: (_, p) => p.name },
  { name: "used_gpu_memory", aliases: ["used_memory"], unit: "MiB", value: (_, p) => p.usedMib },
];

export const retiredPageFields: readonly RowField<string>[] = [
  ...common<string>(),
  { name: "retired_pages.address", aliases: [], unit: undefined, value: () => "[N/A]" },
  { name: "retired_pages.timestamp", aliases: [], unit: undefined, value: () => "[N/A]" },
  { name: "retired_pages.cause", aliases: [], unit: undefined, value: (_, cause) => cause },
];
