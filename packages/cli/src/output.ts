/** Machine-readable results and tables go to standard output, everything else to standard error. */
export type OutputFormat = "table" | "json";

export interface Column<Row> {
  readonly header: string;
  /** null and undefined show as "-". */
  readonly value: (row: Row) => string | number | boolean | null | undefined;
}

export interface Output {
  readonly format: OutputFormat;
  /** A list: a table, or `{"items": [...]}`. */
  list<Row>(rows: readonly Row[], columns: readonly Column<Row>[]): void;
  /** One thing: a line per field, or the object. */
  item<Row>(row: Row, columns: readonly Column<Row>[]): void;
  /** One thing of a stream: a line without header, or one JSON object a line. */
  streamed<Row>(row: Row, columns: readonly Column<Row>[]): void;
  /** Bytes as they are (logs). */
  raw(chunk: Uint8Array): void;
  /** For people: standard error. */
  note(text: string): void;
}

export interface TextSink {
  write(chunk: string | Uint8Array): unknown;
}

/** Text of others must not move the reader's cursor or colour the terminal. */
export function printable(value: string | number | boolean | null | undefined): string {
  if (value === null || value === undefined || value === "") return "-";
  return String(value).replaceAll(/\p{Cc}+/gu, " ");
}

export function createOutput(format: OutputFormat, stdout: TextSink, stderr: TextSink): Output {
  const json = (value: unknown): void => {
    stdout.write(`${JSON.stringify(value, null, 2)}\n`);
  };
  return {
    format,
    list(rows, columns) {
      if (format === "json") {
        json({ items: rows });
        return;
      }
      if (rows.length === 0) {
        stderr.write("none\n");
        return;
      }
      const cells = [
        columns.map((column) => column.header.toUpperCase()),
        ...rows.map((row) => columns.map((column) => printable(column.value(row)))),
      ];
      const widths = columns.map((_, index) => Math.max(...cells.map((line) => (line[index] ?? "").length)));
      for (const line of cells) {
        stdout.write(
          `${line
            .map((cell, index) => cell.padEnd(widths[index] ?? 0))
            .join("  ")
            .trimEnd()}\n`,
        );
      }
    },
    item(row, columns) {
      if (format === "json") {
        json(row);
        return;
      }
      const width = Math.max(...columns.map((column) => column.header.length)) + 1;
      for (const column of columns) {
        stdout.write(`${`${column.header}:`.padEnd(width)} ${printable(column.value(row))}\n`);
      }
    },
    streamed(row, columns) {
      stdout.write(
        format === "json"
          ? `${JSON.stringify(row)}\n`
          : `${columns.map((column) => printable(column.value(row))).join("  ")}\n`,
      );
    },
    raw: (chunk) => void stdout.write(chunk),
    note: (text) => void stderr.write(`${text}\n`),
  };
}
