import type { ControllerProcess } from "../cluster/controller.ts";
import { eventually } from "../cluster/eventually.ts";
import { createApi } from "../cluster/api.ts";
import type { SimulatedServer } from "../server.ts";
import type { DemoEngine } from "./engine.ts";
import { heading, line, step } from "./screen.ts";

interface Walk {
  readonly controller: ControllerProcess;
  readonly servers: readonly SimulatedServer[];
  readonly engine: DemoEngine;
}

/** One tenant's allocation: asked for, running, watched, released, verified. Throws at the first step that fails. */
export async function walk({ controller, servers, engine }: Walk): Promise<void> {
  const admin = controller.api;
  heading("What there is");
  for (const server of (await admin.get("/api/v1/servers")).items) {
    const gpus = (await admin.get(`/api/v1/gpus?server_id=${server.id}`)).items;
    line(
      `${String(server.name).padEnd(12)} ${server.state.padEnd(10)} ${gpus.length} x ${gpus[0]?.model ?? "no GPU"}, driver ${(await admin.get(`/api/v1/gpus/${gpus[0]?.id}`)).inventory.driver_version}`,
    );
  }

  heading("A tenant takes two H100 and gives them back");
  const tenant = await admin.post("/api/v1/tenants", { name: "acme" });
  const token = await admin.post(`/api/v1/tenants/${tenant.id}/tokens`, { name: "demo" });
  const api = createApi(controller.url, token.token);

  const allocation = await step("Ask for 2 x H100 for an hour", () =>
    api.post(
      "/api/v1/allocations",
      {
        name: "training",
        gpus: { count: 2, model: "H100" },
        container: {
          image: engine.image,
          ...(engine.command.length > 0 ? { command: engine.command } : {}),
          stop_grace_seconds: 1,
        },
        lease_seconds: 3600,
      },
      { "idempotency-key": `demo-${Date.now()}` },
    ),
  );
  const active = await step(
    "The container runs",
    () =>
      eventually(
        "the allocation is active",
        async () => {
          const seen = await api.get(`/api/v1/allocations/${allocation.id}`);
          if (seen.state === "ended" || seen.state === "releasing")
            throw new Error(`${seen.state}: ${seen.message}`);
          if (seen.state === "active") return seen;
          throw new Error(`${seen.state}: ${seen.message || JSON.stringify(seen.observed)}`);
        },
        { timeoutMs: 60_000 },
      ),
    (seen) =>
      `on ${seen.server_name}, GPUs ${seen.gpus.map((gpu: { index: number }) => gpu.index).join(" and ")}`,
  );
  const gpuId: string = active.gpus[0].id;

  await step(
    "Telemetry moves with the load",
    () =>
      eventually(
        "a GPU of the allocation is busy",
        async () => {
          const { sample } = await admin.get(`/api/v1/gpus/${gpuId}/status`);
          return sample !== null && sample.utilization_ratio > 0.5 && sample.memory_used_bytes > 2 ** 30
            ? sample
            : undefined;
        },
        { timeoutMs: 60_000, intervalMs: 500 },
      ),
    (sample) =>
      `${Math.round(sample.utilization_ratio * 100)} % busy, ${(sample.memory_used_bytes / 2 ** 30).toFixed(1)} GiB, ${Math.round(sample.power_draw_watts)} W, ${Math.round(sample.temperature_celsius)} °C`,
  );
  const logs = await step("Logs", () =>
    eventually("the container has printed something", async () => {
      const response = await api.request("GET", `/api/v1/allocations/${allocation.id}/logs?tail=3`);
      const text = String(response.body).trim();
      return response.status === 200 && text !== "" ? text : undefined;
    }),
  );
  for (const text of logs.split("\n").slice(-3)) line(`  | ${text}`);

  await step("Release", () => api.delete(`/api/v1/allocations/${allocation.id}`));
  await step(
    "Container gone, GPUs verified clean",
    () =>
      eventually(
        "the allocation has ended",
        async () => {
          const seen = await api.get(`/api/v1/allocations/${allocation.id}`);
          return seen.state === "ended" ? seen : undefined;
        },
        { timeoutMs: 90_000, intervalMs: 250 },
      ),
    (seen) => `end reason: ${seen.end_reason}`,
  );
  await step(
    "All GPUs are free again",
    async () => {
      const { items } = await admin.get("/api/v1/gpus?state=free&limit=500");
      const all = servers.reduce((sum, server) => sum + server.gpus.length, 0);
      if (items.length !== all) throw new Error(`${items.length} of ${all} GPUs are free`);
      return items.length;
    },
    (count) => `${count}`,
  );
}
