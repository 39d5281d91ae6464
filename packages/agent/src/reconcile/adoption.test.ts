import { existsSync } from "node:fs";
import { writeFile } from "node:fs/promises";
import { join } from "node:path";
import {
  ContainerSpec_RestartPolicy as Restart,
  WorkloadObserved_Phase as Phase,
} from "@palebluedot/shared/generated/palebluedot/agent/v1/agent.ts";
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, test } from "vitest";
import { forever, startEngineFixture } from "./testing/engine-fixture.ts";
import { createStand, document, eventually, workload, type Stand } from "./testing/stand.ts";

const wanted = (incarnation: string, generation: number, names: readonly string[]) =>
  document(
    generation,
    names.map((name) => workload(name, forever)),
    { incarnation },
  );

const fixture = await startEngineFixture();

describe.skipIf(fixture.why !== "")(
  `restarts of agent and engine, on a real Docker Engine${fixture.why}`,
  () => {
    const { engine } = fixture;
    let stand: Stand;

    beforeAll(() => fixture.prepare());
    afterAll(() => fixture.engine.stop());
    beforeEach(async () => {
      stand = await fixture.open();
    });
    afterEach(() => fixture.close(stand));

    test("a container outlives its agent: adopted by its labels, neither restarted nor made anew", async () => {
      await stand.restart();
      const [gpu = ""] = stand.gpus.uuids;
      await stand.reconciler.setDesired(document(7, [workload("long", forever, { gpuUuids: [gpu] })]));
      const before = await stand.phase("long", "RUNNING");
      await stand.restart();
      expect(stand.reconciler.held()).toEqual({ incarnation: "incarnation-1", generation: 7 });
      const after = await stand.phase("long", "RUNNING");
      expect(after.containerId).toBe(before.containerId);
      expect(after.startedAtUnixMs).toBe(before.startedAtUnixMs);
      expect((await fixture.containers()).length).toBe(1);
      // The adopted one still holds its GPU.
      await stand.reconciler.setDesired(
        document(8, [
          workload("long", forever, { gpuUuids: [gpu] }),
          workload("next", forever, { gpuUuids: [gpu] }),
        ]),
      );
      await stand.phase("next", "ACCEPTED", "waiting-for-gpu");
      // A lower generation of the same incarnation is ignored, another incarnation begins a new order.
      await stand.reconciler.setDesired(document(3, []));
      expect(stand.reconciler.held().generation).toBe(8);
      await stand.reconciler.setDesired(
        document(
          1,
          [
            workload("long", forever, { gpuUuids: [gpu], reclaimed: true }),
            workload("next", forever, { gpuUuids: [gpu] }),
          ],
          {
            incarnation: "incarnation-2",
          },
        ),
      );
      await stand.phase("long", "CLEAN");
      await stand.phase("next", "RUNNING");
      expect(stand.reconciler.held()).toEqual({ incarnation: "incarnation-2", generation: 1 });
    });

    test("a restored controller and another enrolment begin a new order of generations", async () => {
      const { reconciler } = stand;
      await stand.restart();
      const held = () => stand.reconciler.held();
      await stand.reconciler.setDesired(wanted("before", 7, ["old"]), "server-1");
      await stand.phase("old", "RUNNING");
      await stand.reconciler.setDesired(wanted("before", 3, []), "server-1");
      expect(held()).toEqual({ incarnation: "before", generation: 7 });
      await stand.reconciler.setDesired(wanted("after", 3, ["old"]), "server-1");
      expect(held()).toEqual({ incarnation: "after", generation: 3 });
      // Over a restart, too: whose document it is was stored with it.
      await stand.restart();
      expect(stand.reconciler).not.toBe(reconciler);
      await stand.reconciler.setDesired(wanted("after", 0, []), "server-1");
      expect(held()).toEqual({ incarnation: "after", generation: 3 });
      await stand.phase("old", "RUNNING");
      await stand.reconciler.setDesired(wanted("after", 0, []), "server-2");
      expect(held()).toEqual({ incarnation: "after", generation: 0 });
      await eventually("removed", async () => ((await fixture.containers()).length === 0 ? true : undefined));
    });

    test("what nobody wants is removed, but only once a document is held, and never what is another's", async () => {
      const other = await createStand({ dockerHost: engine.dockerHost });
      try {
        await other.restart();
        await other.reconciler.setDesired(document(1, [workload("others", forever)]));
        const others = await other.phase("others", "RUNNING");
        await stand.restart();
        await stand.reconciler.setDesired(
          document(1, [
            workload("keep", forever),
            workload("orphan", { ...forever, volumes: [{ name: "v", mountPath: "/v" }] }),
          ]),
        );
        await stand.phase("keep", "RUNNING");
        const orphan = await stand.phase("orphan", "RUNNING");
        await stand.reconciler.setDesired(document(2, [workload("keep", forever)]));
        await eventually("orphan gone", async () =>
          (await fixture.containers()).some(({ Id }) => Id === orphan.containerId) ? undefined : true,
        );
        await eventually("its volume gone", () =>
          existsSync(join(stand.dataDir, "volumes", "orphan")) ? undefined : true,
        );
        expect((await fixture.inspect(others.containerId)).State.Status).toBe("running");
        expect(stand.of("keep")?.phase).toBe(Phase.RUNNING);
        await eventually("told", () =>
          stand.events.find((event) => event.type === "container.orphan-removed"),
        );

        // The document lost (a damaged disk): what runs is left alone until there is a new one.
        await stand.reconciler.stop();
        await writeFile(join(stand.dataDir, "desired.json"), "garbage");
        await stand.restart();
        expect(stand.reconciler.held()).toEqual({ incarnation: "", generation: 0 });
        const keep = (await fixture.containers()).find(
          ({ Labels }) => Labels["palebluedot.allocation"] === "keep",
        );
        expect((await fixture.inspect(keep?.Id ?? "")).State.Status).toBe("running");
        await stand.reconciler.setDesired(document(1, []));
        await eventually("removed now", async () =>
          (await fixture.containers()).some(({ Id }) => Id === keep?.Id) ? undefined : true,
        );
      } finally {
        await other.close();
      }
    });

    test.skipIf(fixture.engine.daemon === undefined)(
      "an engine that is away changes no phase; when it is back the work goes on",
      async () => {
        await stand.restart();
        await stand.reconciler.setDesired(
          document(1, [
            workload("service", { ...forever, restartPolicy: Restart.ALWAYS }),
            workload("job", { ...forever, restartPolicy: Restart.NEVER }),
          ]),
        );
        await stand.phase("service", "RUNNING");
        await stand.phase("job", "RUNNING");
        const told: number[] = [];
        stand.reconciler.onObserved((observed) =>
          told.push(
            ...observed.workloads.filter((one) => one.allocationId === "gone").map((one) => one.phase),
          ),
        );
        await engine.daemon?.stop();
        try {
          await eventually("condition", () =>
            stand.reconciler
              .conditions()
              .find((one) => one.component === "container-engine" && one.reason === "unresponsive"),
          );
          const before = stand.of("service")?.phase;
          expect([Phase.RUNNING, Phase.CREATING]).toContain(before);
          // Asked to give it back while the engine is away: nothing may be claimed.
          await stand.reconciler.setDesired(
            document(2, [
              workload("service", { ...forever, restartPolicy: Restart.ALWAYS }),
              workload("job", { ...forever, restartPolicy: Restart.NEVER }),
              workload("gone", forever, { reclaimed: true }),
            ]),
          );
          await stand.restart();
          // Also an agent that starts now says what was last known, not that it is gone.
          expect(stand.of("service")?.phase).toBe(before);
          expect(stand.of("gone")?.phase).toBe(Phase.ACCEPTED);
          expect(told).not.toContain(Phase.CLEAN);
        } finally {
          await engine.daemon?.start();
        }
        await stand.phase("gone", "CLEAN");
        await eventually("restarted", () =>
          (stand.of("service")?.restartCount ?? 0) >= 1 ? true : undefined,
        );
        await stand.phase("service", "RUNNING");
        await stand.phase("job", "EXITED");
      },
    );
  },
);
