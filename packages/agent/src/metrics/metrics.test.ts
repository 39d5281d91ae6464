import { execFileSync } from "node:child_process";
import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { request } from "node:https";
import type { TLSSocket } from "node:tls";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { readFileSync } from "node:fs";
import { systemClock } from "@palebluedot/shared/clock.ts";
import { Condition_Status } from "@palebluedot/shared/generated/palebluedot/agent/v1/agent.ts";
import { createLogger } from "@palebluedot/shared/logger.ts";
import { recordingsDir } from "@palebluedot/shared/testing/recordings.ts";
import type { GpuReading } from "../gpu/reading.ts";
import type { TimedReading } from "../gpu/monitor-types.ts";
import { renderGpuSeries } from "./gpu-series.ts";
import { createMetrics, type AgentMetrics } from "./metrics.ts";
import { startMetricsServer, type MetricsServer, type MetricsServerOptions } from "./server.ts";

const hasOpenssl = ((): boolean => {
  try {
    execFileSync("openssl", ["version"], { stdio: "ignore" });
    return true;
  } catch {
    return false;
  }
})();

const uuid = "GPU-11111111-2222-3333-4444-555555555555";
const full: GpuReading = {
  index: 3,
  uuid,
  pciBusId: "00000000:18:00.0",
  model: 'NVIDIA "H100"',
  driverVersion: "580.65.06",
  minorNumber: 3,
  utilizationRatio: 0.57,
  memoryUtilizationRatio: 0,
  encoderUtilizationRatio: 0,
  decoderUtilizationRatio: 0,
  temperatureCelsius: 41,
  memoryTemperatureCelsius: 48,
  powerDrawWatts: 631.95,
  smClockMhz: 1980,
  memoryClockMhz: 2619,
  memoryUsedBytes: 19818 * 1024 * 1024,
  memoryFreeBytes: 61263 * 1024 * 1024,
  memoryReservedBytes: 479 * 1024 * 1024,
  pcieReplayCount: 150,
  remappedRowsCorrectable: 0,
  remappedRowsUncorrectable: 1,
  remappedRowsFailure: false,
};

function render(reading: GpuReading, lastXid?: number): string {
  return renderGpuSeries([{ reading, lastXid, allocation: undefined }], "node-7");
}

describe("renderGpuSeries", () => {
  it("writes dcgm-exporter's names, units and labels", () => {
    const text = render(full, 79);
    const labels = `{gpu="3",UUID="${uuid}",pci_bus_id="00000000:18:00.0",device="nvidia3",modelName="NVIDIA \\"H100\\"",Hostname="node-7",DCGM_FI_DRIVER_VERSION="580.65.06"}`;
    expect(text).toContain(`# HELP DCGM_FI_DEV_GPU_UTIL GPU utilization (in %).
# TYPE DCGM_FI_DEV_GPU_UTIL gauge
DCGM_FI_DEV_GPU_UTIL${labels} 57
`);
    expect(text).toContain(`DCGM_FI_DEV_FB_USED${labels} 19818\n`);
    expect(text).toContain(`DCGM_FI_DEV_POWER_USAGE${labels} 631.95\n`);
    expect(text).toContain(`DCGM_FI_DEV_XID_ERRORS${labels} 79\n`);
    expect(text).toContain(`DCGM_FI_DEV_ROW_REMAP_FAILURE${labels} 0\n`);
  });

  it("writes nothing for what was not told", () => {
    const text = render({ index: 0, uuid, temperatureCelsius: 0 });
    expect(text.match(/^DCGM_\w+(?=\{)/gm)).toEqual(["DCGM_FI_DEV_GPU_TEMP"]);
    expect(text).not.toContain("GPU_UTIL");
  });

  it("names the tenant while there is one", () => {
    const allocation = { allocationId: "a-1", tenantId: "t\n1" };
    const text = renderGpuSeries([{ reading: full, lastXid: undefined, allocation }], "n");
    expect(text).toContain('allocation_id="a-1",tenant_id="t\\n1"}');
  });
});

const dir = recordingsDir();
describe.skipIf(dir === undefined)("dcgm-exporter's default counters", () => {
  it("have the same type and help text here", () => {
    const counters = readFileSync(join(dir ?? "", "gpu/dcgm/dcgm-default-counters.csv"), "utf8")
      .split("\n")
      .map((line) => /^(DCGM_\w+)\s*,\s*(gauge|counter)\s*,\s*(.*?)\s*$/.exec(line))
      .filter((match) => match !== null);
    const text = render(full, 79);
    const missing: string[] = [];
    for (const [, name, type, help] of counters) {
      if (!text.includes(`${name ?? ""}{`)) missing.push(name ?? "");
      else {
        expect(text).toContain(`# HELP ${name ?? ""} ${help ?? ""}\n# TYPE ${name ?? ""} ${type ?? ""}\n`);
      }
    }
    // What nvidia-smi's queries do not tell.
    expect(missing.sort()).toEqual([
      "DCGM_FI_DEV_NVLINK_BANDWIDTH_TOTAL",
      "DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION",
      "DCGM_FI_DEV_VGPU_LICENSE_STATUS",
      "DCGM_FI_PROF_DRAM_ACTIVE",
      "DCGM_FI_PROF_GR_ENGINE_ACTIVE",
      "DCGM_FI_PROF_PCIE_RX_BYTES",
      "DCGM_FI_PROF_PCIE_TX_BYTES",
      "DCGM_FI_PROF_PIPE_TENSOR_ACTIVE",
    ]);
  });
});

/** Over TLS, to the name that the certificate of the test bears. */
function scrape(
  port: number,
  options: { readonly token?: string; readonly ca?: Buffer },
): Promise<{
  readonly status: number | undefined;
  readonly text: string;
  readonly protocol: string | null;
}> {
  return new Promise((resolve, reject) => {
    const outgoing = request(
      {
        host: "127.0.0.1",
        port,
        path: "/metrics",
        servername: "node-7",
        ca: options.ca,
        agent: false,
        timeout: 5000,
        headers: options.token === undefined ? {} : { authorization: `Bearer ${options.token}` },
      },
      (response) => {
        const protocol = (response.socket as TLSSocket).getProtocol();
        let text = "";
        response.setEncoding("utf8").on("data", (chunk: string) => (text += chunk));
        response.on("end", () => resolve({ status: response.statusCode, text, protocol }));
      },
    );
    outgoing.on("error", reject).on("timeout", () => outgoing.destroy(new Error("no answer")));
    outgoing.end();
  });
}

describe("the metrics server", () => {
  let folder: string;
  let readings: TimedReading[];
  let now: number;
  let server: MetricsServer | undefined;
  let metrics: AgentMetrics;

  beforeEach(() => {
    folder = mkdtempSync(join(tmpdir(), "pbd-metrics-"));
    now = 1_000_000;
    readings = [{ reading: full, takenAtUnixMs: now }];
    metrics = createMetrics({
      monitor: {
        intervalMs: 10_000,
        latestReadings: () => readings,
        lastXids: () => new Map(),
        streamRestarts: () => 2,
        snapshot: () => ({
          gpus: [],
          takenAtUnixMs: now,
          conditions: [
            {
              component: "gpu-3",
              status: Condition_Status.FAILED,
              reason: "xid-79",
              message: "",
              sinceUnixMs: 0,
            },
          ],
        }),
      },
      clock: { ...systemClock, now: () => now },
      hostname: "node-7",
      agentVersion: "0.1.0",
      conditions: () => [
        {
          component: "container-engine",
          status: Condition_Status.FAILED,
          reason: "unreachable",
          message: "",
          sinceUnixMs: 0,
        },
      ],
      connected: () => true,
    });
  });
  afterEach(async () => {
    await server?.stop();
    server = undefined;
    rmSync(folder, { recursive: true, force: true });
  });

  async function get(
    path: string,
    options: Partial<MetricsServerOptions> = {},
    headers: Record<string, string> = {},
    method = "GET",
  ): Promise<{ readonly status: number; readonly text: string }> {
    server ??= await startMetricsServer({
      host: "127.0.0.1",
      port: 0,
      metrics,
      health: () => ({ ok: true, details: { gpus: 1 } }),
      log: createLogger({ name: "test", level: "silent" }),
      ...options,
    });
    const response = await fetch(`http://127.0.0.1:${String(server.port)}${path}`, { headers, method });
    return { status: response.status, text: await response.text() };
  }

  it("serves GPU series, conditions and the agent's own health", async () => {
    const { status, text } = await get("/metrics");
    expect(status).toBe(200);
    expect(text).toContain("DCGM_FI_DEV_GPU_TEMP{");
    expect(text).toContain(
      'palebluedot_agent_condition{component="gpu-3",status="failed",reason="xid-79"} 1',
    );
    expect(text).toContain(
      'palebluedot_agent_condition{component="container-engine",status="failed",reason="unreachable"} 1',
    );
    expect(text).toMatch(/^palebluedot_agent_resident_memory_bytes \d+$/m);
    expect(text).toContain("palebluedot_agent_nvidia_smi_restarts 2");
    expect(text).toContain("palebluedot_agent_connected 1");
  });

  it("drops the series of a GPU that was not read for three intervals", async () => {
    now += 30_000;
    expect((await get("/metrics")).text).toContain("DCGM_FI_DEV_GPU_TEMP");
    now += 1;
    expect((await get("/metrics")).text).not.toContain("DCGM_");
  });

  it("wants the token for metrics, never for health, and denies all while the file is missing", async () => {
    const tokenFile = join(folder, "token");
    expect((await get("/metrics", { tokenFile }, { authorization: "Bearer x" })).status).toBe(401);
    await server?.stop();
    server = undefined;
    writeFileSync(tokenFile, "s3cret\n");
    expect((await get("/metrics", { tokenFile })).status).toBe(401);
    expect((await get("/metrics", {}, { authorization: "Bearer wrong" })).status).toBe(401);
    expect((await get("/metrics", {}, { authorization: "Bearer s3cret" })).status).toBe(200);
    expect((await get("/healthz")).status).toBe(200);
  });

  describe.skipIf(!hasOpenssl)("with TLS (needs openssl)", () => {
    let files: { readonly certificateFile: string; readonly keyFile: string };

    beforeEach(() => {
      files = { certificateFile: join(folder, "cert.pem"), keyFile: join(folder, "key.pem") };
      const names = ["-subj", "/CN=node-7", "-addext", "subjectAltName=DNS:node-7"];
      const curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"];
      const out = ["-keyout", files.keyFile, "-out", files.certificateFile];
      execFileSync("openssl", ["req", "-x509", ...curve, "-days", "2", ...names, ...out], {
        stdio: "ignore",
      });
    });

    it("serves its certificate, and still wants the token", async () => {
      const tokenFile = join(folder, "token");
      writeFileSync(tokenFile, "s3cret\n");
      // Plain HTTP finds nothing there.
      await expect(get("/metrics", { tls: files, tokenFile })).rejects.toThrow();
      const port = server?.port ?? 0;
      const ca = readFileSync(files.certificateFile);
      expect(await scrape(port, { ca })).toMatchObject({ status: 401 });
      expect(await scrape(port, { ca, token: "wrong" })).toMatchObject({ status: 401 });
      const answered = await scrape(port, { ca, token: "s3cret" });
      expect(answered).toMatchObject({ status: 200, protocol: "TLSv1.3" });
      expect(answered.text).toContain("DCGM_FI_DEV_GPU_TEMP{");
      // A scraper that does not know the certificate must notice.
      await expect(scrape(port, { token: "s3cret" })).rejects.toThrow(/self-signed/);
    });

    it.each(["certificateFile", "keyFile"] as const)("does not start with an unusable %s", async (which) => {
      writeFileSync(files[which], "garbage");
      await expect(get("/metrics", { tls: files })).rejects.toMatchObject({ code: "metrics-tls-unreadable" });
      await expect(
        get("/metrics", { tls: { ...files, [which]: join(folder, "absent") } }),
      ).rejects.toMatchObject({ code: "metrics-tls-unreadable" });
    });
  });

  it.each([
    ["/nothing", "GET", 404],
    ["/metrics", "POST", 405],
  ])("answers %s %s with %i", async (path, method, status) => {
    expect((await get(path, {}, {}, method)).status).toBe(status);
  });

  it("says that the port is taken", async () => {
    await get("/healthz");
    await expect(
      startMetricsServer({
        host: "127.0.0.1",
        port: server?.port ?? 0,
        metrics,
        health: () => ({ ok: true, details: {} }),
        log: createLogger({ name: "test", level: "silent" }),
      }),
    ).rejects.toMatchObject({ code: "metrics-listen-failed" });
  });
});
