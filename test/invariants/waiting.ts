/**
 * Who may wait while GPUs are free: the scheduler's order rules once more, written down apart from it, for
 * fleets of one GPU model.
 */

export interface WaitingAllocation {
  readonly id: string;
  readonly priority: number;
  readonly createdAt: number;
  readonly count: number;
}

export interface FreeServer {
  readonly id: string;
  /** All its GPUs, claimed or not. */
  readonly gpus: number;
  readonly free: number;
}

/** Who waits longer than this gets a server kept free. */
const holdAfterMs = 300_000;
const maxHolders = 8;

/**
 * Those of the waiting that should have been started, in words. In the order of priority, age, id a request
 * must be started if it fits on a server that is not kept free for one before it; the first eight that wait
 * for more than five minutes each have the open server kept free that lacks the fewest GPUs.
 */
export function wronglyWaiting(
  waiting: readonly WaitingAllocation[],
  servers: readonly FreeServer[],
  now: number,
): string[] {
  const wrong: string[] = [];
  const keptFor = new Map<string, string>();
  let holders = 0;
  const inOrder = waiting.toSorted(
    (left, right) =>
      right.priority - left.priority || left.createdAt - right.createdAt || (left.id < right.id ? -1 : 1),
  );
  for (const request of inOrder) {
    const fits = servers.find((server) => server.free >= request.count && !keptFor.has(server.id));
    if (fits !== undefined) {
      const kept = [...keptFor].map(([server, owner]) => `${server} for ${owner}`).join(", ");
      wrong.push(
        `${request.id} waits for ${request.count} GPUs while ${fits.free} are free on ${fits.id}` +
          (kept === "" ? "" : ` (kept free: ${kept})`),
      );
      continue;
    }
    if (now - request.createdAt <= holdAfterMs || holders >= maxHolders) continue;
    const promising = servers
      .filter((server) => server.gpus >= request.count)
      .toSorted((left, right) => right.free - left.free || (left.id < right.id ? -1 : 1))[0];
    if (promising === undefined) continue;
    holders += 1;
    if (!keptFor.has(promising.id)) keptFor.set(promising.id, request.id);
  }
  return wrong;
}
