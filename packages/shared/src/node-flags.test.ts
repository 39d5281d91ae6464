import { readFileSync } from "node:fs";
import { expect, test } from "vitest";
import { nodeFlags } from "./node-flags.ts";

test("the controller runs with the same flags from a checkout", () => {
  const manifest = JSON.parse(readFileSync(new URL("../../../package.json", import.meta.url), "utf8")) as {
    scripts: { controller: string };
  };
  expect(manifest.scripts.controller.match(/ --\S+/g)?.map((flag) => flag.trim())).toEqual(
    nodeFlags.controller,
  );
});
