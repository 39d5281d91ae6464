/**
 * `npm run demo [-- --once] [-- --port 8080]`: a controller on embedded PostgreSQL, four simulated GPU
 * servers with the real agent on each, and one allocation from request to verified clean.
 */
import { chmodSync, mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { parseArgs } from "node:util";
import { startAgent, type AgentProcess } from "../cluster/agent.ts";
import { startController } from "../cluster/controller.ts";
import type { RunningProcess } from "../cluster/process.ts";
import { eventually } from "../cluster/eventually.ts";
import { createSimulatedServer, type SimulatedServer } from "../server.ts";
import { chooseEngine, type DemoEngine } from "./engine.ts";
import { heading, line, step } from "./screen.ts";
import { walk } from "./walk.ts";

const fleet = [
  { name: "demo-h100", model: "h100", count: 8, driver: 580 },
  { name: "demo-a100", model: "a100", count: 8, driver: 570 },
  { name: "demo-l40s", model: "l40s", count: 4, driver: 595 },
  { name: "demo-t4", model: "t4", count: 1, driver: 535 },
] as const;

const { values } = parseArgs({
  options: {
    once: { type: "boolean", default: false },
    port: { type: "string", default: "0" },
    help: { type: "boolean", default: false },
  },
});
if (values.help) {
  process.stdout.write(
    "npm run demo [-- --once] [-- --port N]\n  --once  walk through one allocation, tidy up and exit\n  --port  of the REST API; default: any free one\n",
  );
  process.exit(0);
}

const directory = mkdtempSync(join(tmpdir(), "palebluedot-demo-"));
// Started by root, the database runs as a user of its own, who must be able to pass.
chmodSync(directory, 0o711);
const running: RunningProcess[] = [];
let engine: DemoEngine | undefined;
let ending = false;

async function end(code: number): Promise<never> {
  if (!ending) {
    ending = true;
    heading("Tidying up");
    // Agents before engines and the controller, so that nobody reports what is only the end of the demo.
    for (const part of running.toReversed()) await part.stop(10_000);
    await engine?.stop();
    rmSync(directory, { recursive: true, force: true, maxRetries: 5, retryDelay: 200 });
    line("Everything of the demo is stopped and removed.");
  }
  process.exit(code);
}
process.on("SIGINT", () => void end(130));
process.on("SIGTERM", () => void end(143));

async function main(): Promise<void> {
  heading("Palebluedot demo");
  const controller = await step("Controller with embedded PostgreSQL", async () => {
    const started = await startController({
      dataDir: join(directory, "controller"),
      env: { PALEBLUEDOT_TELEMETRY_INTERVAL_MS: "1000" },
      ports: { http: Number(values.port), enrolment: 0, agent: 0 },
      startTimeoutMs: 120_000,
    });
    running.push(started);
    return started;
  });

  const servers: SimulatedServer[] = fleet.map(({ name, model, count, driver }, index) =>
    createSimulatedServer({
      dir: join(directory, name),
      model,
      count,
      driver,
      hostname: name,
      seed: index + 1,
      speed: 4,
    }),
  );
  engine = await step(
    "Container engine",
    () => chooseEngine(directory, servers),
    (chosen) => chosen.description,
  );
  const chosen = engine;

  const joinToken = await step("Join token (4 uses, approves by itself)", () =>
    controller.api.post("/api/v1/join-tokens", { name: "demo", auto_approve: true, max_uses: fleet.length }),
  );
  await step(`${fleet.length} servers start the agent, enrol and report their GPUs`, async () => {
    for (const [index, { name }] of fleet.entries()) {
      const server = servers[index];
      if (server === undefined) continue;
      const agent: AgentProcess = startAgent({
        dataDir: join(directory, name, "agent"),
        controller: controller.enrolmentEndpoint,
        caFingerprint: controller.caFingerprint,
        joinToken: joinToken.token,
        env: { ...server.env, ...chosen.agentEnv(server), PALEBLUEDOT_TELEMETRY_INTERVAL_MS: "1000" },
      });
      running.push(agent);
    }
    return eventually(
      "all servers are available",
      async () => {
        const dead = running.find((part) => !part.isRunning());
        if (dead !== undefined) throw new Error(`a process ended:\n${dead.logTail()}`);
        const { items } = await controller.api.get("/api/v1/servers?state=available");
        return items.length === fleet.length ? items : undefined;
      },
      { timeoutMs: 90_000, intervalMs: 250 },
    );
  });

  await walk({ controller, servers, engine: chosen });

  if (values.once) await end(0);
  const tokenFile = join(directory, "controller", "admin-token");
  const environment = join(directory, "demo.env");
  writeFileSync(
    environment,
    `export PALEBLUEDOT_URL=${controller.url}\nexport PALEBLUEDOT_TOKEN_FILE=${tokenFile}\n`,
    { mode: 0o600 },
  );
  heading("It stays up. Next:");
  line(`REST API      ${controller.url}/api/v1     description: ${controller.url}/docs`);
  line(`admin token   in ${tokenFile}`);
  line(`              source ${environment}`);
  line("              npm run -s pbd -- servers list");
  line("              npm run -s pbd -- gpus list");
  line(`              npm run -s pbd -- alloc create --gpus 2 --model H100 --image ${chosen.image}`);
  line("              npm run -s pbd -- events");
  line(`break one     npm run -s simulator -- gpu --help     (state: ${servers[0]?.stateDir ?? ""})`);
  line("Ctrl-C ends it and removes everything.");
  await Promise.race(running.map((part) => part.exited));
  if (!ending) {
    const dead = running.find((part) => !part.isRunning());
    line(`A process ended unexpectedly:\n${dead?.logTail() ?? ""}`);
    await end(1);
  }
}

await main().catch(async (error: unknown) => {
  process.stderr.write(`\nThe demo failed: ${error instanceof Error ? error.message : String(error)}\n`);
  if (error instanceof Error && error.cause !== undefined)
    process.stderr.write(
      `because: ${error.cause instanceof Error ? error.cause.message : JSON.stringify(error.cause)}\n`,
    );
  await end(1);
});
