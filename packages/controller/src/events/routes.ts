import { z } from "@hono/zod-openapi";
import { PlatformError } from "@palebluedot/shared/errors.ts";
import type { HttpContext } from "../http/context.ts";
import { decodeCursor, pageOf } from "../http/cursor.ts";
import { idSchema, pageQuery, pageSchema, queryInteger } from "../http/fields.ts";
import { defineRoute, type Route } from "../http/route.ts";
import { streamResponse } from "../http/streams.ts";
import type { Principal } from "../identity/permissions.ts";
import { type EventFilter, eventJsonSchema, type EventRow, eventToJson } from "./event-row.ts";

const eventSchema = eventJsonSchema.meta({ id: "Event" });
const severitySchema = z.enum(["info", "warning", "error"]);
const typePrefix = z.string().regex(/^[a-z0-9._-]{1,64}$/, "a dotted event type or the start of one");
const seqPattern = /^\d{1,15}$/;

const repeated = <T extends z.ZodType<string>>(item: T) =>
  z
    .union([item, z.array(item).max(16)])
    .transform((value): z.output<T>[] => (Array.isArray(value) ? value : [value]) as z.output<T>[])
    .optional();

/** What this principal may see: a tenant sees its own events, whatever it asks for. */
function visible(principal: Principal, filter: EventFilter): EventFilter {
  if (principal.permissions.has("events:all")) return filter;
  // The nil UUID belongs to nobody: a principal without tenant sees nothing.
  return { ...filter, tenantId: principal.tenantId ?? "00000000-0000-0000-0000-000000000000" };
}

function lastEventId(header: string | undefined): number | undefined {
  if (header === undefined || header === "") return undefined;
  if (!seqPattern.test(header)) {
    throw new PlatformError({
      code: "invalid-last-event-id",
      kind: "invalid",
      message: "Last-Event-ID is not a sequence number of this stream",
      hint: "Send the id of the last event that you got, or leave it out to start from now.",
    });
  }
  return Number(header);
}

export function eventRoutes(context: HttpContext): Route[] {
  const { events, identity } = context;

  function live(
    principal: Principal,
    filter: EventFilter,
    afterSeq: number | undefined,
    signal: AbortSignal,
    form: "event-stream" | "lines",
  ) {
    const watch = identity.watch(principal.tokenId);
    const clientGone = new AbortController();
    const encoder = new TextEncoder();
    return streamResponse<EventRow>({
      items: events.subscribe({
        ...(afterSeq === undefined ? {} : { afterSeq }),
        filter,
        signal: AbortSignal.any([signal, watch.signal, clientGone.signal]),
      }),
      ...(form === "event-stream"
        ? {
            encode: (event) =>
              encoder.encode(
                `id: ${event.seq}\nevent: ${event.type}\ndata: ${JSON.stringify(eventToJson(event))}\n\n`,
              ),
            contentType: "text/event-stream",
            preamble: "retry: 2000\n\n",
            keepAlive: ": keep-alive\n\n",
          }
        : {
            encode: (event) => encoder.encode(`${JSON.stringify(eventToJson(event))}\n`),
            contentType: "application/x-ndjson",
            keepAlive: "\n",
          }),
      onEnd() {
        watch.end();
        clientGone.abort();
      },
    });
  }

  return [
    defineRoute({
      method: "get",
      path: "/api/v1/events",
      operationId: "listEvents",
      summary: "List events, or follow them live",
      description:
        "With `Accept: text/event-stream` the answer is a live stream (server-sent events) whose ids are sequence numbers: `Last-Event-ID` (or after_seq) resumes without gap or duplicate. `Accept: application/x-ndjson` gives the same as JSON lines, and a WebSocket on this path as one message each. Otherwise a page, newest first unless order=ascending. Tenants see their own events.",
      tag: "event",
      access: "events:read",
      query: z.strictObject({
        ...pageQuery,
        type: repeated(typePrefix).openapi({
          type: "array",
          items: { type: "string" },
          description: "Start of the type, e.g. allocation.; repeated: any of them",
        }),
        severity: repeated(severitySchema).openapi({
          type: "array",
          items: { type: "string", enum: [...severitySchema.options] },
        }),
        server_id: idSchema.optional(),
        gpu_id: idSchema.optional(),
        allocation_id: idSchema.optional(),
        tenant_id: idSchema.optional().openapi({ description: "For operators" }),
        after_seq: queryInteger(0, Number.MAX_SAFE_INTEGER).optional(),
        order: z.enum(["ascending", "descending"]).default("descending"),
      }),
      headers: z.object({
        "Last-Event-ID": z.string().optional().openapi({ description: "Sequence number to resume after" }),
      }),
      result: pageSchema(eventSchema),
      media: ["text/event-stream", "application/x-ndjson"],
      async handle({ query, principal, header, signal }) {
        const filter = visible(principal, {
          ...(query.type === undefined ? {} : { typePrefixes: query.type }),
          ...(query.severity === undefined ? {} : { severities: query.severity }),
          ...(query.server_id === undefined ? {} : { serverId: query.server_id }),
          ...(query.gpu_id === undefined ? {} : { gpuId: query.gpu_id }),
          ...(query.allocation_id === undefined ? {} : { allocationId: query.allocation_id }),
          ...(query.tenant_id === undefined ? {} : { tenantId: query.tenant_id }),
        });
        const form = /\b(text\/event-stream|application\/x-ndjson)\b/i.exec(header("accept") ?? "")?.[1];
        if (form !== undefined) {
          const after = lastEventId(header("last-event-id")) ?? query.after_seq;
          const lines = form.toLowerCase() === "application/x-ndjson";
          return live(principal, filter, after, signal, lines ? "lines" : "event-stream");
        }
        const ascending = query.order === "ascending";
        const scope = ["events", filter, query.order, query.after_seq];
        const key =
          query.cursor === undefined ? undefined : Number(decodeCursor(scope, query.cursor, seqPattern));
        const afterSeq = ascending ? (key ?? query.after_seq) : query.after_seq;
        const rows = await events.list({
          ...(afterSeq === undefined ? {} : { afterSeq }),
          ...(ascending || key === undefined ? {} : { beforeSeq: key }),
          limit: query.limit + 1,
          order: query.order,
          filter,
        });
        return { body: pageOf(rows, query.limit, scope, (row) => String(row.seq), eventToJson) };
      },
    }),
  ];
}
