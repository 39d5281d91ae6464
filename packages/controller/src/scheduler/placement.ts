/**
 * Where a request goes: a pure decision over the fleet's capacity in memory. No input, no output, no clock.
 */

export interface GpuCapacity {
  readonly id: string;
  readonly index: number;
  readonly model: string;
  /** Null: the device did not tell. */
  readonly memoryBytes: number | null;
  readonly labels: Readonly<Record<string, string>>;
  /** Present, schedulable, healthy, whole. */
  readonly usable: boolean;
  readonly claimed: boolean;
}

export interface ServerCapacity {
  readonly id: string;
  readonly labels: Readonly<Record<string, string>>;
  /** In words why nothing new may land here; undefined when it may. */
  readonly closedBecause: string | undefined;
  readonly gpus: readonly GpuCapacity[];
}

/** Whole GPUs of one model on one server. */
export interface PlacementRequest {
  readonly count: number;
  /** Full name or a part of it between separators, any case. */
  readonly model?: string | undefined;
  readonly minMemoryBytes?: number | undefined;
  /** Each on the GPU or on its server. */
  readonly labels?: Readonly<Record<string, string>> | undefined;
  readonly serverId?: string | undefined;
}

export interface Placement {
  readonly serverId: string;
  readonly gpuIds: readonly string[];
}

/** One server that fits. */
export interface Candidate {
  readonly server: ServerCapacity;
  readonly model: string;
  /** Free GPUs of that model on it, at least the request's count. */
  readonly free: number;
  readonly request: PlacementRequest;
}

export interface PlacementPolicy {
  readonly name: string;
  /** In which order numbers of free GPUs are looked at. Without a score the first server that fits is taken. */
  readonly order: "fewest-free-first" | "most-free-first";
  /** Lower is better; the lowest id wins a tie. With a score every server that fits is looked at. */
  readonly score?: (candidate: Candidate) => number;
}

/** Leaves the largest holes for the largest requests. */
export const bestFit: PlacementPolicy = { name: "best-fit", order: "fewest-free-first" };
/** Keeps tenants apart as long as there is room. */
export const spread: PlacementPolicy = { name: "spread", order: "most-free-first" };

export const placementPolicies: readonly PlacementPolicy[] = [bestFit, spread];

export interface CapacityIndex {
  readonly size: number;
  set(server: ServerCapacity): void;
  remove(serverId: string): void;
  get(serverId: string): ServerCapacity | undefined;
  clear(): void;
  /** Takes nothing; `commit` does. */
  place(request: PlacementRequest, except?: ReadonlySet<string>): Placement | undefined;
  /** Marks the GPUs as claimed. */
  commit(placement: Placement): void;
  /** The open server that comes closest to fitting and could fit when it is empty. */
  mostPromising(request: PlacementRequest): string | undefined;
  /** In words, why nothing fits now. Looks at every server. */
  explain(request: PlacementRequest): string;
}

interface Entry {
  server: ServerCapacity;
  /** Free GPUs by model; empty when the server is closed. */
  free: Map<string, number>;
}

const separators = /[\s\-_/]+/;

/** "H100", "h100 80gb" and the full name match "NVIDIA H100 80GB HBM3"; "H10" does not. */
export function modelMatches(wanted: string, model: string): boolean {
  const words = model.toLowerCase().split(separators);
  const wantedWords = wanted.toLowerCase().trim().split(separators);
  return words.some((_, start) => wantedWords.every((word, offset) => words[start + offset] === word));
}

export function createCapacityIndex(policy: PlacementPolicy = bestFit): CapacityIndex {
  const entries = new Map<string, Entry>();
  /** Model -> number of free GPUs -> ids of servers, sorted. */
  const buckets = new Map<string, string[][]>();
  const matchCache = new Map<string, boolean>();

  function matches(wanted: string | undefined, model: string): boolean {
    if (wanted === undefined) return true;
    const key = `${wanted}\n${model}`;
    let result = matchCache.get(key);
    if (result === undefined) {
      result = modelMatches(wanted, model);
      // Wanted names come from tenants: the cache must not grow with their imagination.
      if (matchCache.size > 10_000) matchCache.clear();
      matchCache.set(key, result);
    }
    return result;
  }

  function bucketOf(model: string, free: number): string[] {
    let ofModel = buckets.get(model);
    if (ofModel === undefined) buckets.set(model, (ofModel = []));
    while (ofModel.length <= free) ofModel.push([]);
    return ofModel[free] ?? [];
  }

  function file(id: string, entry: Entry): void {
    for (const [model, free] of entry.free) insertSorted(bucketOf(model, free), id);
  }

  function unfile(id: string, entry: Entry): void {
    for (const [model, free] of entry.free) removeSorted(bucketOf(model, free), id);
  }

  function set(server: ServerCapacity): void {
    const old = entries.get(server.id);
    if (old !== undefined) unfile(server.id, old);
    const entry: Entry = { server, free: freeByModel(server) };
    entries.set(server.id, entry);
    file(server.id, entry);
  }

  function candidateOn(entry: Entry, model: string, request: PlacementRequest): Placement | undefined {
    if ((entry.free.get(model) ?? 0) < request.count) return undefined;
    const gpus = fitting(entry.server, model, request);
    if (gpus.length < request.count) return undefined;
    return { serverId: entry.server.id, gpuIds: gpus.slice(0, request.count).map((gpu) => gpu.id) };
  }

  function place(request: PlacementRequest, except?: ReadonlySet<string>): Placement | undefined {
    if (request.serverId !== undefined) {
      const entry = entries.get(request.serverId);
      if (entry === undefined || except?.has(request.serverId) === true) return undefined;
      const byFree = [...entry.free].sort(
        (left, right) => left[1] - right[1] || compareStrings(left[0], right[0]),
      );
      for (const [model] of byFree) {
        if (!matches(request.model, model)) continue;
        const placement = candidateOn(entry, model, request);
        if (placement !== undefined) return placement;
      }
      return undefined;
    }
    const models = [...buckets.keys()].filter((model) => matches(request.model, model)).sort();
    const most = Math.max(0, ...models.map((model) => (buckets.get(model)?.length ?? 1) - 1));
    let best: { placement: Placement; score: number } | undefined;
    for (let step = request.count; step <= most; step += 1) {
      const free = policy.order === "fewest-free-first" ? step : most - (step - request.count);
      for (const model of models) {
        for (const id of buckets.get(model)?.[free] ?? []) {
          if (except?.has(id) === true) continue;
          const entry = entries.get(id);
          const placement = entry === undefined ? undefined : candidateOn(entry, model, request);
          if (entry === undefined || placement === undefined) continue;
          if (policy.score === undefined) return placement;
          const score = policy.score({ server: entry.server, model, free, request });
          const tieWon = best !== undefined && score === best.score && id < best.placement.serverId;
          if (best === undefined || score < best.score || tieWon) best = { placement, score };
        }
      }
    }
    return best?.placement;
  }

  function mostPromising(request: PlacementRequest): string | undefined {
    let best: { id: string; missing: number } | undefined;
    for (const { server, free } of entries.values()) {
      if (server.closedBecause !== undefined) continue;
      if (request.serverId !== undefined && server.id !== request.serverId) continue;
      for (const model of new Set(server.gpus.map((gpu) => gpu.model))) {
        if (!matches(request.model, model) || eligible(server, model, request) < request.count) continue;
        const missing = request.count - (free.get(model) ?? 0);
        if (
          best === undefined ||
          missing < best.missing ||
          (missing === best.missing && server.id < best.id)
        ) {
          best = { id: server.id, missing };
        }
      }
    }
    return best?.id;
  }

  function explain(request: PlacementRequest): string {
    if (entries.size === 0) return "no server has joined yet";
    const what = describeRequest(request);
    if (request.serverId !== undefined && !entries.has(request.serverId)) {
      return `there is no server ${request.serverId}`;
    }
    const models = new Set<string>();
    let ofModel = 0;
    let largestEligible = 0;
    let open = 0;
    let mostFree = 0;
    const closed = new Map<string, number>();
    for (const { server } of entries.values()) {
      if (request.serverId !== undefined && server.id !== request.serverId) continue;
      let eligibleHere = 0;
      let freeHere = 0;
      let hasModel = false;
      const free = new Map<string, number>();
      const total = new Map<string, number>();
      for (const gpu of server.gpus) {
        models.add(gpu.model);
        if (!matches(request.model, gpu.model)) continue;
        hasModel = true;
        if (!gpu.usable || !gpuSatisfies(gpu, server, request)) continue;
        total.set(gpu.model, (total.get(gpu.model) ?? 0) + 1);
        if (!gpu.claimed) free.set(gpu.model, (free.get(gpu.model) ?? 0) + 1);
      }
      for (const count of total.values()) eligibleHere = Math.max(eligibleHere, count);
      for (const count of free.values()) freeHere = Math.max(freeHere, count);
      if (hasModel) ofModel += 1;
      largestEligible = Math.max(largestEligible, eligibleHere);
      if (eligibleHere < request.count) continue;
      if (server.closedBecause === undefined) {
        open += 1;
        mostFree = Math.max(mostFree, freeHere);
      } else {
        closed.set(server.closedBecause, (closed.get(server.closedBecause) ?? 0) + 1);
      }
    }
    const where =
      request.serverId === undefined ? "no server has" : `server ${request.serverId} does not have`;
    if (ofModel === 0) {
      const known = [...models].sort().slice(0, 8).join(", ");
      return models.size === 0
        ? `${where} GPUs`
        : `${where} GPUs of model ${request.model ?? "any"}; there are: ${known}`;
    }
    if (largestEligible < request.count) {
      return `${where} ${what}: ${plural(ofModel, "server")} of that model, at most ${largestEligible} usable GPUs that match on one`;
    }
    const closedWords = [...closed]
      .sort((left, right) => right[1] - left[1])
      .slice(0, 4)
      .map(([reason, count]) => `${count} ${reason}`)
      .join(", ");
    if (open === 0) return `${where} ${what} that can be used now: ${closedWords}`;
    const base = `${where} ${what} free: ${plural(open, "server")} could hold it, most free on one: ${mostFree}`;
    return closedWords === "" ? base : `${base}; not in use: ${closedWords}`;
  }

  return {
    get size() {
      return entries.size;
    },
    set,
    remove(serverId) {
      const entry = entries.get(serverId);
      if (entry === undefined) return;
      unfile(serverId, entry);
      entries.delete(serverId);
    },
    get: (serverId) => entries.get(serverId)?.server,
    clear() {
      entries.clear();
      buckets.clear();
    },
    place,
    commit(placement) {
      const entry = entries.get(placement.serverId);
      if (entry === undefined) return;
      const taken = new Set(placement.gpuIds);
      set({
        ...entry.server,
        gpus: entry.server.gpus.map((gpu) => (taken.has(gpu.id) ? { ...gpu, claimed: true } : gpu)),
      });
    },
    mostPromising,
    explain,
  };
}

/** The free GPUs of a model on a server that satisfy the request, lowest index first. */
function fitting(server: ServerCapacity, model: string, request: PlacementRequest): GpuCapacity[] {
  return server.gpus.filter(
    (gpu) => gpu.usable && !gpu.claimed && gpu.model === model && gpuSatisfies(gpu, server, request),
  );
}

/** How many GPUs of the model would satisfy the request if nobody used them. */
function eligible(server: ServerCapacity, model: string, request: PlacementRequest): number {
  let count = 0;
  for (const gpu of server.gpus) {
    if (gpu.usable && gpu.model === model && gpuSatisfies(gpu, server, request)) count += 1;
  }
  return count;
}

function freeByModel(server: ServerCapacity): Map<string, number> {
  const free = new Map<string, number>();
  if (server.closedBecause !== undefined) return free;
  for (const gpu of server.gpus) {
    if (gpu.usable && !gpu.claimed) free.set(gpu.model, (free.get(gpu.model) ?? 0) + 1);
  }
  return free;
}

function gpuSatisfies(gpu: GpuCapacity, server: ServerCapacity, request: PlacementRequest): boolean {
  // Unknown memory does not satisfy a minimum.
  if (request.minMemoryBytes !== undefined && (gpu.memoryBytes ?? 0) < request.minMemoryBytes) return false;
  if (request.labels === undefined) return true;
  for (const name in request.labels) {
    const value = request.labels[name];
    if (ownValue(gpu.labels, name) !== value && ownValue(server.labels, name) !== value) return false;
  }
  return true;
}

function ownValue(labels: Readonly<Record<string, string>>, name: string): string | undefined {
  return Object.hasOwn(labels, name) ? labels[name] : undefined;
}

function describeRequest(request: PlacementRequest): string {
  const parts = [`${request.count}`, request.model ?? (request.count === 1 ? "GPU" : "GPUs of one model")];
  if (request.minMemoryBytes !== undefined) {
    parts.push(`with ${Math.ceil(request.minMemoryBytes / 2 ** 20)} MiB or more`);
  }
  const labels = Object.entries(request.labels ?? {});
  if (labels.length > 0) {
    parts.push(
      `labelled ${labels
        .slice(0, 4)
        .map(([name, value]) => `${name}=${value}`)
        .join(", ")}`,
    );
  }
  return parts.join(" ");
}

const plural = (count: number, noun: string): string => `${count} ${noun}${count === 1 ? "" : "s"}`;
const compareStrings = (left: string, right: string): number => (left < right ? -1 : left > right ? 1 : 0);

function position(sorted: readonly string[], value: string): number {
  let low = 0;
  let high = sorted.length;
  while (low < high) {
    const middle = (low + high) >>> 1;
    if ((sorted[middle] ?? "") < value) low = middle + 1;
    else high = middle;
  }
  return low;
}

function insertSorted(sorted: string[], value: string): void {
  const at = position(sorted, value);
  if (sorted[at] !== value) sorted.splice(at, 0, value);
}

function removeSorted(sorted: string[], value: string): void {
  const at = position(sorted, value);
  if (sorted[at] === value) sorted.splice(at, 1);
}
