/** What the engine may give to containers, as it tells itself; 0 where it does not. */
export interface EngineCapacity {
  readonly memoryBytes: number;
  readonly cpus: number;
}

/** What a container gets that asks for no limit of its own. */
export interface HostShare {
  readonly memoryBytes: number;
  readonly cpuMillicores: number;
}

/** The host's own services live in the rest. */
const forTenants = 0.95;
const leastMemoryBytes = 64 * 1024 * 1024;

/**
 * As much of the host as the container has of its GPUs, so that the tenants of all GPUs fit beside each
 * other. Undefined where nothing is known to share by.
 */
export function hostShare(
  capacity: EngineCapacity,
  gpusRequested: number,
  gpusOnHost: number,
): HostShare | undefined {
  if (gpusRequested <= 0 || gpusOnHost <= 0 || capacity.memoryBytes <= 0 || capacity.cpus <= 0) {
    return undefined;
  }
  const share = Math.min(1, gpusRequested / gpusOnHost);
  return {
    memoryBytes: Math.max(leastMemoryBytes, Math.floor(capacity.memoryBytes * forTenants * share)),
    cpuMillicores: Math.max(100, Math.floor(capacity.cpus * 1000 * share)),
  };
}
