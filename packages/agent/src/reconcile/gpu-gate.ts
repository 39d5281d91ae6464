/**
 * The last defence against two tenants on one GPU: whatever the document says, a workload starts only when
 * every GPU of it is held by nobody else. A GPU is held from before its container is made (or from when a
 * running one was adopted) until the workload was verified clean.
 */
export interface GpuGate {
  /** All or nothing. Returns who is in the way, or undefined when the workload now holds all of them. */
  acquire(allocationId: string, gpuUuids: readonly string[]): string | undefined;
  /** A container that exists holds its GPUs, whether or not somebody else does too. */
  adopt(allocationId: string, gpuUuids: readonly string[]): void;
  release(allocationId: string): void;
  /** GPUs held by this allocation. */
  heldBy(allocationId: string): readonly string[];
  holderOf(gpuUuid: string): string | undefined;
}

export function createGpuGate(onReleased: () => void): GpuGate {
  const holders = new Map<string, Set<string>>();
  function adopt(allocationId: string, gpuUuids: readonly string[]): void {
    for (const gpu of gpuUuids) {
      const set = holders.get(gpu) ?? new Set();
      holders.set(gpu, set.add(allocationId));
    }
  }
  return {
    acquire(allocationId, gpuUuids) {
      for (const gpu of gpuUuids) {
        for (const holder of holders.get(gpu) ?? []) if (holder !== allocationId) return holder;
      }
      adopt(allocationId, gpuUuids);
      return undefined;
    },
    adopt,
    release(allocationId) {
      let released = false;
      for (const [gpu, set] of holders) {
        released = set.delete(allocationId) || released;
        if (set.size === 0) holders.delete(gpu);
      }
      if (released) onReleased();
    },
    heldBy: (allocationId) => [...holders].filter(([, set]) => set.has(allocationId)).map(([gpu]) => gpu),
    holderOf: (gpuUuid) => [...(holders.get(gpuUuid) ?? [])][0],
  };
}
