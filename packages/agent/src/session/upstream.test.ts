import { expect, test } from "vitest";
import {
  Inventory,
  type DurableEvent,
  type HostSample,
  type ObservedState,
  type SessionRequest,
} from "@palebluedot/shared/generated/palebluedot/agent/v1/agent.ts";
import type { EventJournal } from "../journal/types.ts";
import { Upstream } from "./upstream.ts";

/** A journal in memory. */
function memoryJournal(count: number): EventJournal {
  const events: DurableEvent[] = Array.from({ length: count }, (_unused, index) => ({
    sequence: index + 1,
    timeUnixMs: 0,
    type: "agent.test",
    gpuUuid: "",
    allocationId: "",
    message: "",
    dataJson: "",
  }));
  return {
    journalId: "j",
    append: () => Promise.resolve(0),
    ackUpTo: () => Promise.resolve(),
    pending: (after, limit) => events.filter((event) => event.sequence > after).slice(0, limit),
    lastSequence: () => count,
    onAppended: () => () => undefined,
    close: () => Promise.resolve(),
  };
}

/** Takes `room` messages, then asks to wait. */
class NarrowStream {
  readonly taken: NonNullable<SessionRequest["message"]>[] = [];
  room: number;

  constructor(room: number) {
    this.room = room;
  }

  write({ message }: SessionRequest): boolean {
    if (message !== undefined) this.taken.push(message);
    this.room -= 1;
    return this.room > 0;
  }
}

const sample = (memoryUsedBytes: number): HostSample => ({
  timeUnixMs: 1,
  cpuUtilizationRatio: undefined,
  memoryUsedBytes,
  load1m: undefined,
});

const observed = (generation: number): ObservedState => ({
  incarnation: "i",
  generation,
  workloads: [],
  conditions: [],
});

test("a blocked stream gets the newest picture only, and telemetry loses its oldest", () => {
  const upstream = new Upstream(memoryJournal(0), { maxTelemetryBatches: 3 });
  const stream = new NarrowStream(1);
  upstream.attach(stream, 0);
  upstream.observed(observed(1));
  for (let generation = 2; generation <= 50; generation += 1) upstream.observed(observed(generation));
  for (let time = 1; time <= 10; time += 1) {
    upstream.telemetry(
      [],
      [{ timeUnixMs: time, cpuUtilizationRatio: undefined, memoryUsedBytes: undefined, load1m: undefined }],
    );
  }
  expect(stream.taken).toHaveLength(1);
  stream.room = 100;
  upstream.drained();
  expect(stream.taken.slice(1).map((message) => message.$case)).toEqual([
    "observedState",
    "telemetry",
    "telemetry",
    "telemetry",
  ]);
  expect(stream.taken[1]).toMatchObject({ value: { generation: 50 } });
  expect(stream.taken[2]).toMatchObject({ value: { hostSamples: [{ timeUnixMs: 8 }] } });
  expect(upstream.droppedTelemetry).toBe(7);
});

test("one batch of events is under way at a time, and a new stream starts where the controller is", () => {
  const upstream = new Upstream(memoryJournal(250));
  const stream = new NarrowStream(100);
  upstream.attach(stream, 0);
  const sent = (on: NarrowStream): number[] =>
    on.taken.flatMap((message) =>
      message.$case === "durableEvents" ? message.value.events.map((event) => event.sequence) : [],
    );
  expect(sent(stream)).toHaveLength(100);
  expect(upstream.acked("j", 100)).toBe(true);
  expect(sent(stream)).toHaveLength(200);
  // The stream breaks before the second batch is acknowledged; the controller has 150 of it.
  upstream.detach();
  const next = new NarrowStream(100);
  upstream.attach(next, 150);
  expect(sent(next)).toEqual(Array.from({ length: 100 }, (_unused, index) => 151 + index));
});

test("an acknowledgement of another journal counts for nothing", () => {
  const upstream = new Upstream(memoryJournal(250));
  const stream = new NarrowStream(100);
  upstream.attach(stream, 0);
  expect(upstream.acked("another", 100)).toBe(false);
  expect(stream.taken).toHaveLength(1);
  expect(upstream.acked("j", 100)).toBe(true);
  expect(stream.taken).toHaveLength(2);
});

test("a message without an encoding is dropped and told, and the stream goes on", () => {
  const unsendable: string[] = [];
  const upstream = new Upstream(memoryJournal(0), { onUnsendable: (what) => unsendable.push(what) });
  const stream = new NarrowStream(100);
  upstream.attach(stream, 0);
  upstream.telemetry([], [sample(0.5)]);
  upstream.observed(observed(1.5));
  upstream.inventory(Inventory.fromPartial({ gpus: [{ uuid: "GPU-1", memoryTotalBytes: 1.5 }] }));
  upstream.telemetry([], [sample(2)]);
  upstream.inventory(Inventory.fromPartial({ gpus: [{ uuid: "GPU-1", memoryTotalBytes: 2 }] }));
  expect(unsendable).toEqual(["telemetry", "observedState", "inventory"]);
  expect(stream.taken).toMatchObject([
    { $case: "telemetry", value: { hostSamples: [{ memoryUsedBytes: 2 }] } },
    { $case: "inventory", value: { gpus: [{ memoryTotalBytes: 2 }] } },
  ]);
});
