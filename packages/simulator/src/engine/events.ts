/** The event stream of the simulated engine. */
import type { Call } from "./http.ts";
import { filters, matchesLabels } from "./http.ts";

interface EngineEvent {
  readonly Type: string;
  readonly Action: string;
  readonly Actor: { readonly ID: string; readonly Attributes: Readonly<Record<string, string>> };
  readonly scope: "local";
  /** Seconds since the epoch. */
  readonly time: number;
  readonly timeNano: number;
}

/** How many past events are kept for `since`. */
const kept = 1_000;

export interface EventLog {
  emit(type: string, action: string, id: string, attributes: Readonly<Record<string, string>>): void;
  stream(call: Call): void;
  close(): void;
}

export function createEventLog(now: () => number): EventLog {
  const past: EngineEvent[] = [];
  const listeners = new Set<{ take: (event: EngineEvent) => void; end: () => void }>();
  return {
    emit(type, action, id, attributes) {
      const ms = now();
      const event: EngineEvent = {
        Type: type,
        Action: action,
        Actor: { ID: id, Attributes: attributes },
        scope: "local",
        time: Math.floor(ms / 1000),
        timeNano: ms * 1e6,
      };
      past.push(event);
      if (past.length > kept) past.shift();
      for (const listener of listeners) listener.take(event);
    },
    stream({ query, response }) {
      const wanted = filters(query);
      const since = Number(query.get("since") ?? Number.NaN);
      const until = Number(query.get("until") ?? Number.NaN);
      const matches = (event: EngineEvent): boolean =>
        (wanted["type"]?.includes(event.Type) ?? true) &&
        (wanted["event"]?.includes(event.Action) ?? true) &&
        (wanted["container"]?.some(
          (id) => event.Actor.ID.startsWith(id) || event.Actor.Attributes["name"] === id,
        ) ??
          true) &&
        matchesLabels(event.Actor.Attributes, wanted["label"] ?? []);
      response.writeHead(200, { "Content-Type": "application/json" });
      response.flushHeaders();
      const take = (event: EngineEvent): void => {
        // A reader that does not read is cut off rather than buffered for.
        if (response.writableLength > 1 << 20) response.destroy();
        else if (matches(event)) {
          response.write(
            `${JSON.stringify({ ...event, status: event.Action, id: event.Actor.ID, from: event.Actor.Attributes["image"] })}\n`,
          );
        }
      };
      if (!Number.isNaN(since)) for (const event of past) if (event.time >= Math.floor(since)) take(event);
      if (!Number.isNaN(until) && until * 1000 <= now()) {
        response.end();
        return;
      }
      const listener = { take, end: () => response.end() };
      listeners.add(listener);
      response.on("close", () => listeners.delete(listener));
    },
    close() {
      for (const listener of listeners) listener.end();
      listeners.clear();
    },
  };
}
