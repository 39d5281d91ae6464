import type { PlacementRequest } from "./placement.ts";

/** A queued allocation, as the scheduler needs it. */
export interface WaitingRequest {
  readonly id: string;
  readonly priority: number;
  readonly createdAt: number;
  readonly request: PlacementRequest;
  /** What its owner was told last. */
  message: string;
}

/** The queue in memory: priority, then age, then id. */
export interface WaitingList {
  readonly size: number;
  has(id: string): boolean;
  add(request: WaitingRequest): void;
  remove(id: string): void;
  clear(): void;
  /** In order. Stable while it is read: additions show up in the next call. */
  inOrder(): readonly WaitingRequest[];
  /** Ids added before `mark`. */
  addedBefore(mark: number): string[];
  /** Grows with each addition. */
  mark(): number;
}

function compare(left: WaitingRequest, right: WaitingRequest): number {
  return (
    right.priority - left.priority ||
    left.createdAt - right.createdAt ||
    (left.id < right.id ? -1 : left.id > right.id ? 1 : 0)
  );
}

export function createWaitingList(): WaitingList {
  const byId = new Map<string, { request: WaitingRequest; mark: number }>();
  let ordered: WaitingRequest[] | undefined;
  let additions = 0;
  return {
    get size() {
      return byId.size;
    },
    has: (id) => byId.has(id),
    add(request) {
      additions += 1;
      byId.set(request.id, { request, mark: additions });
      ordered = undefined;
    },
    remove(id) {
      if (byId.delete(id)) ordered = undefined;
    },
    clear() {
      byId.clear();
      ordered = undefined;
    },
    inOrder() {
      ordered ??= Array.from(byId.values(), (entry) => entry.request).sort(compare);
      return ordered;
    },
    addedBefore: (mark) =>
      Array.from(byId)
        .filter(([, entry]) => entry.mark <= mark)
        .map(([id]) => id),
    mark: () => additions,
  };
}
