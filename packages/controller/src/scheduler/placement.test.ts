import { describe, expect, test } from "vitest";
import {
  bestFit,
  createCapacityIndex,
  modelMatches,
  spread,
  type GpuCapacity,
  type PlacementPolicy,
  type ServerCapacity,
} from "./placement.ts";

const h100 = "NVIDIA H100 80GB HBM3";

function server(
  id: string,
  free: number,
  options: Partial<ServerCapacity> & { total?: number; model?: string; gpu?: Partial<GpuCapacity> } = {},
): ServerCapacity {
  const { total = 8, model = h100, gpu, ...rest } = options;
  return {
    id,
    labels: {},
    closedBecause: undefined,
    gpus: Array.from({ length: total }, (_, index) => ({
      id: `${id}-${index}`,
      index,
      model,
      memoryBytes: 80 * 2 ** 30,
      labels: {},
      usable: true,
      claimed: index >= free,
      ...gpu,
    })),
    ...rest,
  };
}

function indexOf(
  servers: readonly ServerCapacity[],
  policy?: PlacementPolicy,
): ReturnType<typeof createCapacityIndex> {
  const index = createCapacityIndex(policy);
  for (const entry of servers) index.set(entry);
  return index;
}

describe("models", () => {
  test.each([
    ["H100", h100, true],
    ["h100 80gb", h100, true],
    [h100, h100, true],
    ["H10", h100, false],
    ["H100 HBM3", h100, false],
    ["A100", "NVIDIA A100-SXM4-80GB", true],
    ["A100 SXM4", "NVIDIA A100-SXM4-80GB", true],
    ["100", h100, false],
    ["L40", "NVIDIA L40S", false],
  ])("%s and %s: %s", (wanted, model, expected) => {
    expect(modelMatches(wanted, model)).toBe(expected);
  });
});

describe("best fit", () => {
  test("takes the smallest hole that is large enough, the lowest id among equals, the lowest GPUs", () => {
    const index = indexOf([server("d", 8), server("c", 3), server("b", 3), server("a", 2)]);
    expect(index.place({ count: 3 })).toEqual({ serverId: "b", gpuIds: ["b-0", "b-1", "b-2"] });
    expect(index.place({ count: 2 })?.serverId).toBe("a");
    expect(index.place({ count: 4 })?.serverId).toBe("d");
    expect(index.place({ count: 9 })).toBeUndefined();
  });

  test("never takes GPUs of two models, nor mixes what is claimed or unusable", () => {
    const mixed: ServerCapacity = {
      ...server("m", 2, { total: 2 }),
      gpus: [
        ...server("m", 2, { total: 2 }).gpus,
        ...server("n", 2, { total: 2, model: "NVIDIA L40S" }).gpus,
      ],
    };
    const index = indexOf([mixed, server("broken", 8, { gpu: { usable: false } })]);
    expect(index.place({ count: 3 })).toBeUndefined();
    expect(index.place({ count: 2, model: "L40S" })?.gpuIds).toEqual(["n-0", "n-1"]);
  });

  test("honours memory, labels of GPU or server, the named server, and what is kept free", () => {
    const index = indexOf([
      server("a", 8, { gpu: { memoryBytes: null } }),
      server("b", 8, { labels: { zone: "x" }, gpu: { labels: { tier: "gold" } } }),
      server("c", 8),
    ]);
    expect(index.place({ count: 1, minMemoryBytes: 1 })?.serverId).toBe("b");
    expect(index.place({ count: 1, labels: { zone: "x", tier: "gold" } })?.serverId).toBe("b");
    expect(index.place({ count: 1, labels: { zone: "y" } })).toBeUndefined();
    expect(index.place({ count: 1, labels: { toString: "x" } })).toBeUndefined();
    expect(index.place({ count: 1, serverId: "c" })?.serverId).toBe("c");
    expect(index.place({ count: 1, serverId: "nowhere" })).toBeUndefined();
    expect(index.place({ count: 1 }, new Set(["a", "b"]))?.serverId).toBe("c");
  });

  test("what is committed is gone, what is set again is back, what is closed or removed gives nothing", () => {
    const index = indexOf([server("a", 2, { total: 2 })]);
    const placement = index.place({ count: 2 });
    expect(placement).toBeDefined();
    if (placement !== undefined) index.commit(placement);
    expect(index.place({ count: 1 })).toBeUndefined();
    index.set(server("a", 1, { total: 2 }));
    expect(index.place({ count: 1 })?.gpuIds).toEqual(["a-0"]);
    index.set(server("a", 1, { total: 2, closedBecause: "draining" }));
    expect(index.place({ count: 1 })).toBeUndefined();
    index.set(server("a", 1));
    index.remove("a");
    expect([index.place({ count: 1 }), index.size]).toEqual([undefined, 0]);
  });

  test("agrees with the plain definition on random fleets", () => {
    let seed = 1;
    const random = (below: number): number => {
      seed = (seed * 48_271) % 2_147_483_647;
      return seed % below;
    };
    for (let round = 0; round < 300; round += 1) {
      const servers = Array.from({ length: 12 }, (_, place) =>
        server(`s${String(place).padStart(2, "0")}`, random(9), {
          model: random(2) === 0 ? h100 : "NVIDIA L40S",
        }),
      );
      const index = indexOf(servers, bestFit);
      const free = new Map(
        servers.map((entry) => [entry.id, entry.gpus.filter((gpu) => !gpu.claimed).length]),
      );
      for (let step = 0; step < 20; step += 1) {
        const request = { count: 1 + random(8), model: random(2) === 0 ? "H100" : undefined };
        const fits = servers
          .filter((entry) => request.model === undefined || entry.gpus[0]?.model === h100)
          .filter((entry) => (free.get(entry.id) ?? 0) >= request.count)
          .map((entry) => free.get(entry.id) ?? 0);
        const placement = index.place(request);
        expect(placement === undefined).toBe(fits.length === 0);
        if (placement === undefined) continue;
        expect(free.get(placement.serverId)).toBe(Math.min(...fits));
        index.commit(placement);
        free.set(placement.serverId, (free.get(placement.serverId) ?? 0) - request.count);
      }
    }
  });
});

test("other policies: spread takes the emptiest, a score decides among all that fit", () => {
  const servers = [server("a", 2), server("b", 8), server("c", 5)];
  expect(indexOf(servers, spread).place({ count: 2 })?.serverId).toBe("b");
  const wantsFive: PlacementPolicy = {
    name: "five",
    order: "fewest-free-first",
    score: ({ free }) => Math.abs(free - 5),
  };
  expect(indexOf(servers, wantsFive).place({ count: 1 })?.serverId).toBe("c");
});

describe("in words", () => {
  test.each([
    [[], { count: 1 }, "no server has joined yet"],
    [[server("a", 8)], { count: 1, model: "B200" }, `no server has GPUs of model B200; there are: ${h100}`],
    [
      [server("a", 8)],
      { count: 9 },
      "no server has 9 GPUs of one model: 1 server of that model, at most 8 usable GPUs that match on one",
    ],
    [
      [server("a", 5), server("b", 2), server("c", 8, { closedBecause: "draining" })],
      { count: 8, model: "H100" },
      "no server has 8 H100 free: 2 servers could hold it, most free on one: 5; not in use: 1 draining",
    ],
    [
      [server("a", 8, { closedBecause: "unreachable" })],
      { count: 1, model: "H100" },
      "no server has 1 H100 that can be used now: 1 unreachable",
    ],
    [[server("a", 0)], { count: 1, serverId: "b" }, "there is no server b"],
  ])("%#", (servers, request, words) => {
    expect(indexOf(servers).explain(request)).toBe(words);
  });
});
