import { createHash } from "node:crypto";
import { PlatformError } from "@palebluedot/shared/errors.ts";
import { z } from "zod";

/**
 * Keyset cursors. Opaque to callers; they carry the last key of a page and a digest of the list and its
 * filters, so that a cursor of another list or other filters is refused instead of giving a wrong page.
 * They grant nothing (every query filters by tenant itself), so they need no signature.
 */
const cursorSchema = z.strictObject({ s: z.string().max(64), k: z.string().max(128) });

export const maxPageItems = 500;
export const defaultPageItems = 50;

/** `scope`: the list's name and every filter that shapes it. */
export function encodeCursor(scope: unknown, key: string): string {
  return Buffer.from(JSON.stringify({ s: digest(scope), k: key })).toString("base64url");
}

/** Throws PlatformError `invalid-cursor`. `keyPattern` is what a key of this list looks like. */
export function decodeCursor(scope: unknown, cursor: string, keyPattern: RegExp): string {
  let parsed: unknown;
  try {
    parsed = JSON.parse(Buffer.from(cursor, "base64url").toString("utf8"));
  } catch {
    throw invalidCursor("it is not one of ours");
  }
  const checked = cursorSchema.safeParse(parsed);
  if (!checked.success || !keyPattern.test(checked.data.k)) throw invalidCursor("it is not one of ours");
  if (checked.data.s !== digest(scope)) throw invalidCursor("it belongs to another list or other filters");
  return checked.data.k;
}

export const uuidPattern = /^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$/;

export interface Page<T> {
  readonly items: T[];
  readonly next_cursor: string | null;
}

/** Cuts the row too many that the query asked for (`limit + 1`) and makes the cursor of the next page. */
export function pageOf<Row, Item>(
  rows: readonly Row[],
  limit: number,
  scope: unknown,
  keyOf: (row: Row) => string,
  toItem: (row: Row) => Item,
): Page<Item> {
  const kept = rows.slice(0, limit);
  const last = kept.at(-1);
  return {
    items: kept.map(toItem),
    next_cursor: rows.length > limit && last !== undefined ? encodeCursor(scope, keyOf(last)) : null,
  };
}

function digest(scope: unknown): string {
  return createHash("sha256").update(JSON.stringify(scope)).digest("base64url").slice(0, 16);
}

function invalidCursor(why: string): PlatformError {
  return new PlatformError({
    code: "invalid-cursor",
    kind: "invalid",
    message: `the cursor cannot be used: ${why}`,
    hint: "Take next_cursor of the page before, with the same filters; leave it out for the first page.",
  });
}
