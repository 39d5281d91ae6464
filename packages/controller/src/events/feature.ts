import { Counter, Gauge } from "prom-client";
import type { Dependencies } from "../dependencies.ts";
import { listEvents, type EventRow, type ListEventsOptions } from "./event-row.ts";
import { natsBacklog, natsConnectionOptions, startNatsSink, type NatsSink } from "./nats-sink.ts";
import { purgeEvents } from "./purge.ts";
import { startRelay, type Relay } from "./relay.ts";
import { readHead } from "./sequencer.ts";
import { createEventStream, type SubscribeOptions } from "./stream.ts";

/** How far the stream and its sinks are. */
export interface EventsStatus {
  /** Last `seq` given out. */
  readonly lastSeq: number;
  /** Rows that wait for their place. */
  readonly outboxRows: number;
  /** Undefined without NATS_URL. */
  readonly nats:
    | {
        readonly state: "connecting" | "publishing" | "waiting";
        readonly acknowledgedSeq: number;
        /** Events that NATS has not acknowledged. */
        readonly backlog: number;
        /** True when more waits than a moment's traffic explains. */
        readonly behind: boolean;
        readonly lastError: string | undefined;
      }
    | undefined;
}

export interface EventFeature {
  /** Starts the relay and, with NATS_URL, the publisher. */
  start(): void;
  stop(): Promise<void>;
  /** Tells the relay that something was committed to the outbox; without it the relay polls. Never throws. */
  poke(): void;
  list(options: ListEventsOptions): Promise<EventRow[]>;
  subscribe(options: SubscribeOptions): AsyncIterable<EventRow>;
  /** Deletes events recorded before `olderThan`, never those NATS has yet to take. Returns how many. */
  purge(olderThan: Date): Promise<number>;
  status(): Promise<EventsStatus>;
}

export type EventDependencies = Pick<
  Dependencies,
  "sql" | "log" | "failpoints" | "notifications" | "metrics"
> & { readonly config: Pick<Dependencies["config"], "NATS_URL"> };

export interface EventFeatureOptions {
  /** Whether this replica moves and publishes events; several at once are safe, only wasteful. */
  readonly isLeader?: () => boolean;
  readonly relayPollMs?: number;
}

/** A list that takes longer looks for too little in too much. */
const listTimeoutMs = 5000;

/** Events waiting for NATS that are no news. */
const backlogTolerance = 1000;

const metricNames = {
  sequenced: "palebluedot_events_sequenced_total",
  published: "palebluedot_events_nats_published_total",
  subscribers: "palebluedot_events_subscribers",
  publishing: "palebluedot_events_nats_publishing",
  backlog: "palebluedot_events_nats_backlog",
} as const;

export function createEventFeature(deps: EventDependencies, options: EventFeatureOptions = {}): EventFeature {
  const { sql, failpoints, notifications, metrics } = deps;
  const log = deps.log.child({ feature: "events" });
  const natsUrl = deps.config.NATS_URL;
  // A faulty URL stops the start, not the first event.
  if (natsUrl !== undefined) natsConnectionOptions(natsUrl);
  const isLeader = options.isLeader ?? (() => true);
  const stream = createEventStream({ sql, log, notifications });
  let relay: Relay | undefined;
  let sink: NatsSink | undefined;

  const sequenced = new Counter({
    name: metricNames.sequenced,
    help: "Events that got their place in the stream.",
    registers: [metrics],
  });
  const published = new Counter({
    name: metricNames.published,
    help: "Events acknowledged by NATS JetStream.",
    registers: [metrics],
  });
  metrics.registerMetric(
    new Gauge({
      name: metricNames.subscribers,
      help: "Live readers of the event stream.",
      registers: [],
      collect() {
        this.set(stream.subscribers());
      },
    }),
  );
  metrics.registerMetric(
    new Gauge({
      name: metricNames.publishing,
      help: "1 while this replica's publisher is connected to NATS, else 0.",
      registers: [],
      collect() {
        this.set(sink?.status().state === "publishing" ? 1 : 0);
      },
    }),
  );
  metrics.registerMetric(
    new Gauge({
      name: metricNames.backlog,
      help: "Events that NATS has not acknowledged; 0 without NATS_URL.",
      registers: [],
      async collect() {
        if (natsUrl === undefined) {
          this.set(0);
          return;
        }
        // A scrape must not fail because the database is away.
        const rows = await natsBacklog(sql).catch(() => undefined);
        if (rows === undefined) this.reset();
        else this.set(rows);
      },
    }),
  );

  return {
    start() {
      if (relay !== undefined) return;
      if (natsUrl !== undefined) {
        sink = startNatsSink({
          url: natsUrl,
          sql,
          log,
          isLeader,
          onPublished: (count) => published.inc(count),
        });
      }
      relay = startRelay({
        sql,
        log,
        notifications,
        failpoints,
        isLeader,
        onSequenced(moved) {
          sequenced.inc(moved);
          stream.poke();
          sink?.poke();
        },
        ...(options.relayPollMs === undefined ? {} : { pollMs: options.relayPollMs }),
      });
    },
    async stop() {
      await relay?.stop();
      await sink?.stop();
      await stream.close();
      for (const name of Object.values(metricNames)) metrics.removeSingleMetric(name);
    },
    poke: () => relay?.poke(),
    list: (listOptions) =>
      sql.begin("read only", async (tx) => {
        await tx`select set_config('statement_timeout', ${String(listTimeoutMs)}, true)`;
        return await listEvents(tx, listOptions);
      }),
    subscribe: (request) => stream.subscribe(request),
    purge: (olderThan) => purgeEvents(sql, { olderThan, keepUnpublished: natsUrl !== undefined }),
    async status() {
      const [outbox] = await sql<{ rows: number }[]>`select count(*)::int as rows from outbox`;
      const lastSeq = await readHead(sql);
      const current = sink?.status();
      if (natsUrl === undefined) return { lastSeq, outboxRows: outbox?.rows ?? 0, nats: undefined };
      const waiting = await natsBacklog(sql);
      return {
        lastSeq,
        outboxRows: outbox?.rows ?? 0,
        nats: {
          state: current?.state ?? "waiting",
          acknowledgedSeq: lastSeq - waiting,
          backlog: waiting,
          behind: waiting > backlogTolerance || (waiting > 0 && current?.lastError !== undefined),
          lastError: current?.lastError,
        },
      };
    },
  };
}
