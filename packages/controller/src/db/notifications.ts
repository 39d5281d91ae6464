import type { Clock } from "@palebluedot/shared/clock.ts";
import { systemClock } from "@palebluedot/shared/clock.ts";
import { fullJitterMs } from "@palebluedot/shared/backoff.ts";
import { errorMessage } from "@palebluedot/shared/errors.ts";
import type { Logger } from "@palebluedot/shared/logger.ts";
import postgres, { type Options, type Sql } from "postgres";

/**
 * PostgreSQL LISTEN/NOTIFY as a hint between replicas. A hint may be lost (reconnect), so every listener
 * also polls, or rereads after `onReconnect`.
 */
export type NotificationChannel =
  | "desired_state"
  | "fleet"
  | "queue"
  | "outbox"
  | "events"
  | "certificates"
  | "sessions"
  | "identity";

export interface Notifications {
  /** Payload: comma-separated ids, at most 7 kB, or "*" for all. */
  notify(channel: NotificationChannel, payload: string): Promise<void>;
  /** Returns the function that ends the subscription. */
  listen(
    channel: NotificationChannel,
    onPayload: (payload: string) => void,
    onReconnect?: () => void,
  ): () => void;
  close(): Promise<void>;
}

interface Listener {
  readonly onPayload: (payload: string) => void;
  readonly onReconnect: (() => void) | undefined;
}

/**
 * One connection of its own listens for all subscribers. The client library's own `listen` gives up when
 * the first reconnect fails, which a restart of the database always causes; this one goes on.
 */
export function createNotifications(
  sql: Sql,
  options: { readonly log?: Logger; readonly clock?: Clock } = {},
): Notifications {
  const clock = options.clock ?? systemClock;
  const listeners = new Map<NotificationChannel, Set<Listener>>();
  const abort = new AbortController();
  let connection: Sql | undefined;
  let connecting: Promise<void> | undefined;

  function deliver(channel: string, payload: string): void {
    for (const listener of listeners.get(channel as NotificationChannel) ?? []) {
      try {
        listener.onPayload(payload);
      } catch (error) {
        options.log?.error({ err: error, channel }, "a notification listener failed");
      }
    }
  }

  async function connectAndListen(): Promise<void> {
    for (let attempt = 0; !abort.signal.aborted; attempt += 1) {
      const lost = { current: false };
      const client: Sql = postgres({
        ...sql.options,
        max: 1,
        idle_timeout: null,
        max_lifetime: null,
        fetch_types: false,
        onnotify: deliver,
        onclose: () => {
          lost.current = true;
          if (connection === client) reconnect();
        },
      } as unknown as Options<Record<string, never>>);
      try {
        for (const channel of listeners.keys()) await client.unsafe(`listen "${channel}"`);
        if (lost.current) throw new Error("the connection closed at once");
        if (abort.signal.aborted) throw new Error("closed");
        connection = client;
        return;
      } catch (error) {
        await client.end({ timeout: 0 }).catch(() => undefined);
        options.log?.debug({ error: errorMessage(error) }, "cannot listen for notifications yet");
        await clock
          .sleep(20 + fullJitterMs(attempt, { baseMs: 50, capMs: 2000 }), abort.signal)
          .catch(() => undefined);
      }
    }
  }

  function reconnect(): void {
    if (abort.signal.aborted || connecting !== undefined) return;
    const old = connection;
    connection = undefined;
    void old?.end({ timeout: 0 }).catch(() => undefined);
    connecting = connectAndListen().finally(() => {
      connecting = undefined;
      if (abort.signal.aborted) return;
      for (const set of listeners.values()) for (const listener of set) listener.onReconnect?.();
    });
  }

  return {
    async notify(channel, payload) {
      await sql`select pg_notify(${channel}, ${payload})`;
    },
    listen(channel, onPayload, onReconnect) {
      const listener: Listener = { onPayload, onReconnect };
      const set = listeners.get(channel) ?? new Set<Listener>();
      const isNew = set.size === 0;
      set.add(listener);
      listeners.set(channel, set);
      if (connection !== undefined && isNew) {
        connection.unsafe(`listen "${channel}"`).then(
          () => onReconnect?.(),
          () => undefined, // onclose follows and starts over
        );
      } else if (connecting !== undefined && isNew) {
        // The loop may have passed this channel already: go over all of them once more.
        void connecting
          .then(() => connection?.unsafe(`listen "${channel}"`))
          .then(
            () => onReconnect?.(),
            () => undefined,
          );
      } else if (connection === undefined) {
        reconnect();
      }
      return () => {
        set.delete(listener);
      };
    },
    async close() {
      abort.abort(new Error("closed"));
      const open = connection;
      connection = undefined;
      listeners.clear();
      await open?.end({ timeout: 1 }).catch(() => undefined);
      await connecting?.catch(() => undefined);
    },
  };
}
