import {
  isAvailable,
  startDockerEngine,
  type TestDockerEngine,
} from "../../../../../test/support/docker-engine.ts";
import { createStand, makeDeviceNodes, type Stand } from "./stand.ts";

/** What these tests read of an inspected container. */
interface Inspected {
  readonly Id: string;
  readonly State: { readonly Status: string; readonly StartedAt: string };
  readonly Config: { readonly Env: string[]; readonly Labels: Record<string, string> };
  readonly HostConfig: Record<string, unknown>;
}

export const script = (text: string) => ({ command: ["/bin/sh", "-c"], args: [text] });
/** Runs until it is asked to end. */
export const forever = script("trap 'exit 0' TERM; while :; do sleep 0.1; done");

/** A real engine with the images `pbd-test` and `pbd-greedy`, and stands on it that leave no containers. */
export interface EngineFixture {
  /** Empty, or why the tests are skipped, as an ending of their title. */
  readonly why: string;
  /** Only in tests that are not skipped. */
  readonly engine: TestDockerEngine;
  prepare(): Promise<void>;
  open(): Promise<Stand>;
  close(stand: Stand): Promise<void>;
  inspect(id: string): Promise<Inspected>;
  containers(): Promise<{ Id: string; Labels: Record<string, string> }[]>;
}

export async function startEngineFixture(): Promise<EngineFixture> {
  const started = await startDockerEngine();
  const engine = started as TestDockerEngine;
  const containers: EngineFixture["containers"] = async () =>
    (await engine.api("GET", "/containers/json?all=1")) as Awaited<ReturnType<EngineFixture["containers"]>>;
  return {
    why: isAvailable(started) ? "" : ` (skipped: ${started.unavailable})`,
    engine,
    async prepare() {
      await engine.importBusyboxImage("pbd-test");
      await engine.importBusyboxImage("pbd-greedy", {
        env: {
          NVIDIA_VISIBLE_DEVICES: "all",
          NVIDIA_DRIVER_CAPABILITIES: "all",
          NVIDIA_REQUIRE_CUDA: "cuda>=99",
        },
        labels: { "palebluedot.allocation": "forged" },
      });
    },
    async open() {
      const stand = await createStand({ dockerHost: engine.dockerHost });
      await makeDeviceNodes(stand.deviceDir, [
        "nvidia0",
        "nvidia1",
        "nvidia2",
        "nvidia3",
        "nvidiactl",
        "nvidia-uvm",
      ]);
      return stand;
    },
    async close(stand) {
      await stand.close();
      for (const { Id } of await containers()) {
        await engine.api("DELETE", `/containers/${Id}?force=1&v=1`).catch(() => undefined);
      }
    },
    inspect: (id) => engine.api("GET", `/containers/${id}/json`) as Promise<Inspected>,
    containers,
  };
}
