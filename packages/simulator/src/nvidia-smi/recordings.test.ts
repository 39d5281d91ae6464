/**
 * The simulated tool held to recordings of the real one, where they are at hand: the same fields in the same
 * order, the same units, the same forms of "not available"; no recorded value is compared.
 */
import { readdirSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { describe, expect, test } from "vitest";
import { recordingsDir } from "@palebluedot/shared/testing/recordings.ts";
import type { ModelName } from "./models.ts";
import { testServer } from "./testing.ts";

const dir = recordingsDir();

/** The output of a recorded command; the marked header of each section names the command. */
function recorded(file: string, command: RegExp): { readonly command: string; readonly lines: string[] } {
  const all = readFileSync(file, "utf8").split("\n");
  const at = all.findIndex((line) => line.startsWith("# $ nvidia-smi ") && command.test(line.slice(4)));
  if (at < 0) throw new Error(`${file} has no recording of ${String(command)}`);
  const rest = all.slice(at + 2);
  const end = rest.findIndex((line) => line.startsWith("####"));
  return { command: (all[at] ?? "").slice(4), lines: end < 0 ? rest : rest.slice(0, end) };
}

/** What a value is, without what it says: its unavailable form, or its unit. */
function form(value: string): string {
  if (value.startsWith("[") || value === "N/A" || value === "") return value;
  return /^(?:Requested functionality|Insufficient)/.test(value)
    ? value
    : `value ${/^-?[\d.]+ (\S.*)$/.exec(value)?.[1] ?? ""}`.trim();
}

const names = (lines: readonly string[]): string[] =>
  lines.filter((line) => /^"[^" ]+"( or "[^" ]+")*$/.test(line));

const shape = (line: string): string => line.replace(/GPU-[0-9a-f-]+/, "GPU-?");

const labels = (lines: readonly string[]): string[] =>
  lines.map((line) => line.split(":")[0] ?? "").filter((label) => label !== "");

interface XmlLeaf {
  readonly path: string;
  readonly text: string | undefined;
}

/** Element paths of the first GPU in order of appearance, once each; documents of this tool need no more of a parser. */
function gpuPaths(xml: string): XmlLeaf[] {
  const body = xml.slice(xml.indexOf("<gpu id="), xml.indexOf("</gpu>"));
  const stack: string[] = [];
  const leaves = new Map<string, string | undefined>();
  for (const match of body.matchAll(/<(\/?)([\w:.-]+)[^>]*?(\/?)>([^<]*)/g)) {
    const [, close, tag = "", empty, text = ""] = match;
    if (close) {
      stack.pop();
      continue;
    }
    stack.push(tag);
    const path = stack.slice(1).join("/");
    const next = body.slice((match.index ?? 0) + match[0].length);
    if (path !== "" && !leaves.has(path)) leaves.set(path, next.startsWith("</") ? text.trim() : undefined);
    if (empty) stack.pop();
  }
  return [...leaves].map(([path, text]) => ({ path, text }));
}

const forms = (leaves: readonly XmlLeaf[]): string[] =>
  leaves.map(({ path, text }) => `${path}: ${text === undefined ? "" : form(text)}`);

describe.skipIf(dir === undefined)("recordings of the real nvidia-smi", () => {
  const gpu = join(dir ?? "", "gpu");

  describe.each<{ match: string; model: ModelName; driver: number; mig?: boolean }>([
    { match: "h100-80gb-hbm3", model: "h100", driver: 590 },
    { match: "l40s", model: "l40s", driver: 595 },
    { match: "h200-mig", model: "h200", driver: 590, mig: true },
    { match: "h100-mig", model: "h100", driver: 590, mig: true },
  ])("capture of $match", ({ match, model, driver, mig }) => {
    // A function: the body of a skipped block runs all the same.
    const file = (): string => {
      const captures = join(gpu, "captures");
      return join(captures, readdirSync(captures).find((name) => name.includes(match)) ?? "missing");
    };

    test("--query-gpu with every field: names, units, order, unavailable forms", async () => {
      using server = testServer({ model, count: 1, driver });
      const capture = recorded(file(), /--query-gpu=/);
      const fields = /--query-gpu=(\S+)/.exec(capture.command)?.[1] ?? "";
      const { code, out } = await server.smi(`--query-gpu=${fields}`, "--format=csv");
      expect(code).toBe(0);
      const [header = "", row = ""] = out.split("\n");
      expect(header).toBe(capture.lines[0]);
      const names = header.split(", ");
      const ours = row.split(", ");
      const theirs = (capture.lines[1] ?? "").split(", ");
      const differing = names.filter((_, index) => form(ours[index] ?? "") !== form(theirs[index] ?? ""));
      // MIG takes these away; the simulated GPU has it off.
      const underMig = /^(utilization\.|remapped_rows\.(correctable|uncorrectable|pending|failure))/;
      expect(mig ? differing.filter((name) => !underMig.test(name)) : differing).toEqual([]);
    });

    test("--help-query-gpu: fields and their aliases, in order", async () => {
      using server = testServer({ model, count: 1, driver });
      const { out } = await server.smi("--help-query-gpu");
      expect(names(out.split("\n"))).toEqual(names(recorded(file(), /--help-query-gpu$/).lines));
    });

    test("-L, --version, topo -m, compute apps: the same shape", async () => {
      using server = testServer({ model, count: 1, driver });
      const list = (await server.smi("-L")).out.split("\n")[0] ?? "";
      expect(shape(list)).toBe(shape(recorded(file(), /-L$/).lines[0] ?? ""));
      expect(labels((await server.smi("--version")).out.split("\n"))).toEqual(
        labels(recorded(file(), /--version$/).lines),
      );
      const topology = (await server.smi("topo", "-m")).out.split("\n");
      const theirs = recorded(file(), /topo -m$/).lines;
      expect(topology[0]).toBe(theirs[0]);
      expect(topology[1]?.split("\t").length).toBe(theirs[1]?.split("\t").length);
      const apps = recorded(file(), /--query-compute-apps=/);
      const { out } = await server.smi(
        /--query-compute-apps=\S+/.exec(apps.command)?.[0] ?? "",
        "--format=csv",
      );
      expect(out.split("\n")[0]).toBe(apps.lines[0]);
    });
  });

  // Under MIG the utilisation reads N/A, and rows cannot be told.
  const underMig = /^(utilization|remapped_rows|mig_devices)\b/;
  test.each<{ file: string; model: ModelName; driver: number; except?: RegExp; pathsOnly?: boolean }>([
    { file: "qx-h100.xml", model: "h100", driver: 580 },
    { file: "qx-b200.xml", model: "b200", driver: 580 },
    { file: "qx-l40s.xml", model: "l40s", driver: 595 },
    { file: "a100-sxm4-v12.xml", model: "a100", driver: 535, except: underMig },
    // Another model of the same driver: which elements exist is the driver's doing, what they say the model's.
    { file: "rtx-3060-v12.xml", model: "t4", driver: 570, pathsOnly: true },
  ])(
    "$file: element paths in order, unavailable forms, units",
    async ({ file, model, driver, except, pathsOnly }) => {
      using server = testServer({ model, count: 1, driver });
      const ours = gpuPaths((await server.smi("-q", "-x")).out).filter(({ path }) => !except?.test(path));
      const theirs = gpuPaths(readFileSync(join(gpu, "xml", file), "utf8")).filter(
        ({ path }) => !except?.test(path),
      );
      expect(ours.map(({ path }) => path)).toEqual(theirs.map(({ path }) => path));
      if (pathsOnly) return;
      expect(forms(ours)).toEqual(forms(theirs));
    },
  );

  test("the path matrix: what each driver generation has", async () => {
    const [head = "", ...rows] = readFileSync(join(gpu, "xml-path-matrix.txt"), "utf8").trimEnd().split("\n");
    // The numbered columns of these drivers; both models have neither voltage nor MIG devices in use.
    const columns: readonly { column: number; model: ModelName; driver: number }[] = [
      { column: 6, model: "a100", driver: 570 },
      { column: 7, model: "h100", driver: 580 },
      { column: 9, model: "l40s", driver: 595 },
    ];
    for (const { column, model, driver } of columns) {
      expect(head).toContain(` ${driver}`);
      const expected = rows
        .map((row) => row.split(" "))
        .filter((cells) => cells[column] === "X" && cells[0]?.startsWith("/gpu/"))
        .map((cells) => (cells[0] ?? "").slice("/gpu/".length))
        .filter((path) => !path.startsWith("remapped_rows") && !path.startsWith("mig_devices/"));
      using server = testServer({ model, count: 1, driver });
      const ours = new Set(gpuPaths((await server.smi("-q", "-x")).out).map(({ path }) => path));
      expect(
        expected.filter((path) => !ours.has(path)),
        `driver ${driver}`,
      ).toEqual([]);
    }
  });
});
