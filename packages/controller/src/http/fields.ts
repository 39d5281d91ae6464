import { z } from "@hono/zod-openapi";
import { labelsSchema } from "@palebluedot/shared/vocabulary.ts";
import { defaultPageItems, maxPageItems } from "./cursor.ts";

/** Field schemas that several features' routes share. */

export const idSchema = z.uuid().openapi({ format: "uuid" });
export const idParams = z.strictObject({ id: idSchema });

export const timeSchema = z.iso.datetime().openapi({ format: "date-time", description: "RFC 3339, UTC" });

export const timeOf = (time: Date): string => time.toISOString();
export const timeOrNull = (time: Date | null | undefined): string | null => time?.toISOString() ?? null;

/** A whole number in a query string. Empty, signed and fractional text is refused. */
export const queryInteger = (minimum: number, maximum: number) =>
  z
    .string()
    .regex(/^\d{1,15}$/, "must be a whole number")
    .transform(Number)
    .pipe(z.number().int().min(minimum).max(maximum))
    .openapi({ type: "integer", minimum, maximum });

export const queryBoolean = z
  .enum(["true", "false"])
  .transform((value) => value === "true")
  .openapi({ type: "boolean" });

/** One line of text from people, without control characters. */
export const lineSchema = (maximum: number) =>
  z
    .string()
    .max(maximum)
    .regex(/^[^\p{Cc}]*$/u, "must not hold control characters");

export const pageQuery = {
  limit: queryInteger(1, maxPageItems)
    .default(defaultPageItems)
    .openapi({ type: "integer", minimum: 1, maximum: maxPageItems, default: defaultPageItems }),
  cursor: z.string().max(512).optional().openapi({ description: "next_cursor of the page before" }),
};

export const pageSchema = <Item extends z.ZodType>(item: Item) =>
  z.object({
    items: z.array(item),
    next_cursor: z.string().nullable().openapi({ description: "null on the last page" }),
  });

export const labelMap = labelsSchema;

/** `label=key=value` or `label=key`, repeated: all must hold. */
export const labelQuery = z
  .union([z.string().max(320), z.array(z.string().max(320)).max(16)])
  .transform((value) => (Array.isArray(value) ? value : [value]))
  .openapi({
    type: "array",
    items: { type: "string" },
    description: "key=value, or key alone; repeated: all must hold",
  })
  .optional();

export interface LabelFilter {
  readonly equal: Readonly<Record<string, string>>;
  readonly present: readonly string[];
}

export function labelFilter(selectors: readonly string[] | undefined): LabelFilter {
  const equal: Record<string, string> = {};
  const present: string[] = [];
  for (const selector of selectors ?? []) {
    const at = selector.indexOf("=");
    if (at < 0) present.push(selector);
    else equal[selector.slice(0, at)] = selector.slice(at + 1);
  }
  return { equal, present };
}
