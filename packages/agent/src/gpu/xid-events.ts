import type { Clock } from "@palebluedot/shared/clock.ts";
import type { KernelGpuEvent } from "./kernel-log.ts";
import type { GpuEvent } from "./types.ts";

/** One fault can print thousands of lines; the first is told, the others are counted into the next. */
const repeatWindowMs = 60_000;
const maxKeys = 512;

export interface XidEvents {
  /** Undefined for a repetition within a minute. */
  from(event: KernelGpuEvent, gpuUuid: string): GpuEvent | undefined;
}

export function createXidEvents(clock: Clock, bootTimeUnixMs: () => number | undefined): XidEvents {
  const recent = new Map<string, { readonly toldAtMs: number; suppressed: number }>();
  return {
    from: (event, gpuUuid) => {
      const now = clock.now();
      const key = `${event.kind} ${String(event.number)} ${event.pciBusId}`;
      const before = recent.get(key);
      if (before !== undefined && now - before.toldAtMs < repeatWindowMs) {
        before.suppressed += 1;
        return undefined;
      }
      recent.delete(key);
      recent.set(key, { toldAtMs: now, suppressed: 0 });
      if (recent.size > maxKeys) {
        const oldest = recent.keys().next().value;
        if (oldest !== undefined) recent.delete(oldest);
      }
      const boot = bootTimeUnixMs();
      const fromUptime =
        event.uptimeSeconds === undefined || boot === undefined
          ? undefined
          : Math.round(boot + event.uptimeSeconds * 1000);
      // A clock of a fresh host may be anywhere: a time in the future is not believed.
      const told = event.timeUnixMs ?? fromUptime ?? now;
      return {
        type: event.kind === "fallen-off-bus" ? "gpu.lost" : `gpu.${event.kind}`,
        gpuUuid,
        message: describe(event),
        timeUnixMs: told > now ? now : told,
        data: {
          ...(event.kind === "sxid" ? { sxid: event.number } : { xid: event.number }),
          pci: event.pciBusId,
          pid: event.pid,
          process: event.processName,
          name: event.name,
          action: event.action,
          message: event.message,
          repeated: before?.suppressed ?? 0,
        },
      };
    },
  };
}

function describe(event: KernelGpuEvent): string {
  if (event.kind === "fallen-off-bus") return `${event.pciBusId}: ${event.message}`;
  const kind = event.kind === "xid" ? "Xid" : "SXid";
  const name = event.name === undefined ? "" : ` (${event.name})`;
  return `${kind} ${String(event.number)}${name} on ${event.pciBusId}: ${event.message}`;
}
