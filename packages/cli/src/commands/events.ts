import { isPlatformError } from "@palebluedot/shared/errors.ts";
import { z } from "zod";
import { defineCommand, integerText } from "../command.ts";
import type { Column } from "../output.ts";
import { readServerSentEvents } from "../server-sent-events.ts";
import { eventSchema, resolveId } from "./resources.ts";

const columns: Column<z.output<typeof eventSchema>>[] = [
  { header: "seq", value: (event) => event.seq },
  { header: "time", value: (event) => event.occurred_at },
  { header: "severity", value: (event) => event.severity },
  { header: "type", value: (event) => event.type },
  { header: "message", value: (event) => event.message },
];

const reconnectMs = 1000;

export const events = defineCommand({
  path: ["events"],
  description: "Show what happened, newest last",
  options: [
    { flags: "-f, --follow", description: "go on with what happens; survives a controller restart" },
    {
      flags: "--type <prefix>",
      description: 'such as "allocation."; repeated: any of them',
      repeatable: true,
    },
    { flags: "--severity <severity>", description: "info, warning or error; repeated", repeatable: true },
    { flags: "--server <server>", description: "only of this server (name or id)" },
    { flags: "--allocation <allocation>", description: "only of this allocation (name or id)" },
    { flags: "--after <seq>", description: "only after this sequence number" },
    { flags: "-n, --limit <count>", description: "how many past events (default 50)" },
  ],
  input: z.object({
    follow: z.boolean().default(false),
    type: z.array(z.string()).optional(),
    severity: z.array(z.enum(["info", "warning", "error"])).optional(),
    server: z.string().optional(),
    allocation: z.string().optional(),
    after: integerText(0, Number.MAX_SAFE_INTEGER).optional(),
    limit: integerText(1, 100_000).default(50),
  }),
  async run(context, input) {
    const api = await context.api();
    const query = {
      type: input.type,
      severity: input.severity,
      server_id: input.server === undefined ? undefined : await resolveId(api, "server", input.server),
      allocation_id:
        input.allocation === undefined ? undefined : await resolveId(api, "allocation", input.allocation),
    };
    const past = await api.list("events", eventSchema, {
      query: {
        ...query,
        after_seq: input.after,
        // With a place to go on from, the oldest first; else the newest, turned round.
        order: input.after === undefined ? "descending" : "ascending",
      },
      limit: input.limit,
    });
    if (input.after === undefined) past.reverse();
    if (!input.follow) {
      context.output.list(past, columns);
      return;
    }
    for (const event of past) context.output.streamed(event, columns);
    let position = past.at(-1)?.seq ?? input.after;
    if (position === undefined) {
      // Nothing matched yet: what happens from now on, but without a hole before the stream is open.
      const [newest] = await api.list("events", eventSchema, { query: {}, limit: 1 });
      position = newest?.seq ?? 0;
    }
    while (!context.signal.aborted) {
      try {
        const stream = await api.stream("events", {
          accept: "text/event-stream",
          query,
          headers: { "last-event-id": String(position) },
          signal: context.signal,
        });
        for await (const message of readServerSentEvents(stream)) {
          const event = eventSchema.safeParse(parseJson(message.data));
          if (!event.success || event.data.seq <= position) continue;
          position = event.data.seq;
          context.output.streamed(event.data, columns);
        }
      } catch (error) {
        if (context.signal.aborted) return;
        // What a new try cannot mend ends it: a revoked token, a faulty filter.
        if (isPlatformError(error) && !["unavailable", "exhausted"].includes(error.kind)) throw error;
      }
      if (context.signal.aborted) return;
      context.output.note("The event stream ended; connecting again.");
      await context.sleep(reconnectMs);
    }
  },
});

function parseJson(text: string): unknown {
  try {
    return JSON.parse(text);
  } catch {
    return undefined;
  }
}
