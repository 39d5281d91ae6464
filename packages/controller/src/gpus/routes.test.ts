import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { GpuSample } from "@palebluedot/shared/generated/palebluedot/agent/v1/agent.ts";
import { createTestApi, type TestApi, type TestServer } from "../http/testing.ts";

let api: TestApi;
let server: TestServer;
let gpu: { id: string; uuid: string };

beforeAll(async () => {
  api = await createTestApi();
  server = await api.makeServer("gpu-host", { gpus: 2 });
  await api.makeServer("t4-host", { gpus: 1, model: "Tesla T4" });
  gpu = server.gpus[0] ?? { id: "", uuid: "" };
});
afterAll(() => api.close());

/** Not one that was kept from before. */
const capacityNow = () => {
  api.clock.advance(2000);
  return api.call("GET", "/api/v1/capacity");
};

const free = async (): Promise<number> => {
  const { json } = await capacityNow();
  return json.items.find((item: { model: string }) => item.model.includes("H100")).free_count as number;
};

describe("GPUs", () => {
  test("are listed by model, server, state and label", async () => {
    const count = async (query: string): Promise<number> =>
      (await api.call("GET", `/api/v1/gpus?${query}`)).json.items.length as number;
    expect(await count("")).toBe(3);
    expect(await count("model=h100")).toBe(2);
    expect(await count(`server_id=${server.id}&state=free`)).toBe(2);
    expect(await count("state=claimed")).toBe(0);
    expect(await count("health=healthy&present=true")).toBe(3);
    await api.call("PATCH", `/api/v1/gpus/${gpu.id}`, { json: { labels: { burnin: "done" } } });
    expect(await count("label=burnin=done")).toBe(1);
  });

  test("show their inventory in the API's words", async () => {
    const answer = await api.call("GET", `/api/v1/gpus/${gpu.id}`);
    expect(answer.json).toMatchObject({
      uuid: gpu.uuid,
      server_name: "gpu-host",
      memory_bytes: 85_520_809_984,
      state: "free",
      inventory: { driver_version: "570.86" },
    });
  });

  test("keep their reason when an operator closes them for scheduling, and it is announced", async () => {
    const closed = await api.call("PATCH", `/api/v1/gpus/${gpu.id}`, {
      json: { scheduling: { schedulable: false, reason: "fan noise" } },
    });
    expect(closed.json).toMatchObject({ schedulable: false, schedulable_reason: "fan noise" });
    expect(api.fleetChanges).toContain(server.id);
    const capacity = await capacityNow();
    expect(capacity.json.items).toMatchObject([
      {
        model: "NVIDIA H100 80GB HBM3",
        total_count: 2,
        free_count: 1,
        unavailable_count: 1,
        largest_free_count: 1,
      },
      { model: "Tesla T4", total_count: 1, free_count: 1, unavailable_count: 0, largest_free_count: 1 },
    ]);
    await api.call("PATCH", `/api/v1/gpus/${gpu.id}`, { json: { scheduling: { schedulable: true } } });
  });

  test.each(["container-engine", "gpu-driver", "nvidia-smi"])(
    "capacity of a server with a failed %s is not free: the scheduler places nothing there",
    async (part) => {
      const { sql } = api.deps;
      for (const [status, expected] of [
        ["failed", 0],
        ["degraded", 2],
      ] as const) {
        await sql`update servers set conditions = ${sql.json({ [part]: { status } })} where id = ${server.id}`;
        expect(await free(), status).toBe(expected);
      }
      await sql`update servers set conditions = '{}' where id = ${server.id}`;
    },
  );

  test("capacity of a server that is draining or unreachable is not free", async () => {
    expect(await free()).toBe(2);
    await api.call("PATCH", `/api/v1/servers/${server.id}`, { json: { draining: true } });
    expect(await free()).toBe(0);
    await api.call("PATCH", `/api/v1/servers/${server.id}`, { json: { draining: false } });
    await api.deps
      .sql`update servers set conditions = '{"unreachable": {"status": "failed"}}' where id = ${server.id}`;
    expect(await free()).toBe(0);
    await api.deps.sql`update servers set conditions = '{}' where id = ${server.id}`;
  });

  test("capacity is counted once for all who ask within two seconds", async () => {
    const { token } = await api.makeTenant("eager");
    const before = await capacityNow();
    await api.deps.sql`update servers set draining = true where id = ${server.id}`;
    const soon = await api.call("GET", "/api/v1/capacity", { token });
    expect(soon.json).toEqual(before.json);
    expect((await capacityNow()).json).not.toEqual(before.json);
    await api.deps.sql`update servers set draining = false where id = ${server.id}`;
  });

  test("capacity tells a tenant how many, not where", async () => {
    const { token } = await api.makeTenant("curious");
    const answer = await api.call("GET", "/api/v1/capacity", { token });
    expect(answer.status).toBe(200);
    expect(JSON.stringify(answer.json)).not.toMatch(/gpu-host|GPU-|server_id/);
    expect((await api.call("GET", "/api/v1/gpus", { token })).status).toBe(403);
  });
});

describe("readings", () => {
  test("without any the status says so: null, not zero", async () => {
    const status = await api.call("GET", `/api/v1/gpus/${gpu.id}/status`);
    expect(status.json).toMatchObject({ sample: null, sample_age_seconds: null, health: "healthy" });
  });

  test("are shown with their units; what the device did not tell is null", async () => {
    const now = api.clock.now();
    const sample = (ageMs: number): GpuSample => ({
      ...GpuSample.fromPartial({ gpuUuid: gpu.uuid, timeUnixMs: now - ageMs }),
      utilizationRatio: 0.73,
      temperatureCelsius: 0,
      powerDrawWatts: 311.2,
    });
    api.telemetry.append(server.id, [sample(90_000), sample(20_000), sample(10_000)]);
    const status = await api.call("GET", `/api/v1/gpus/${gpu.id}/status`);
    expect(status.json.sample).toMatchObject({
      utilization_ratio: 0.73,
      temperature_celsius: 0,
      power_draw_watts: 311.2,
      memory_used_bytes: null,
      fan_speed_ratio: null,
    });
    expect(status.json.sample_age_seconds).toBeGreaterThanOrEqual(10);
    const window = await api.call("GET", `/api/v1/gpus/${gpu.id}/metrics?window_seconds=60`);
    const times = window.json.samples.map((item: { time: string }) => Date.parse(item.time));
    expect(times).toEqual([now - 20_000, now - 10_000]);
  });
});
