import { chmod, mkdir, readFile, rename, stat, writeFile } from "node:fs/promises";
import { randomBytes } from "node:crypto";
import { homedir } from "node:os";
import { dirname, join } from "node:path";
import { PlatformError } from "@palebluedot/shared/errors.ts";
import { z } from "zod";

/** A controller and how to speak to it. */
const contextSchema = z.object({
  url: z.url({ protocol: /^https?$/ }),
  token: z.string().min(1),
  /** PEM of the authority that signed the controller's certificate; absent: the system's. */
  ca_pem: z.string().optional(),
});
export type Context = z.infer<typeof contextSchema>;

const fileSchema = z.object({
  current: z.string().optional(),
  contexts: z.record(z.string(), contextSchema).default({}),
});
export type ContextFile = z.infer<typeof fileSchema>;

type Environment = Readonly<Record<string, string | undefined>>;

/** `PALEBLUEDOT_CLI_CONFIG`, or `palebluedot/config.json` under XDG_CONFIG_HOME or ~/.config. */
export function contextFilePath(env: Environment): string {
  const explicit = env["PALEBLUEDOT_CLI_CONFIG"];
  if (explicit !== undefined && explicit !== "") return explicit;
  const base = env["XDG_CONFIG_HOME"];
  return join(
    base !== undefined && base !== "" ? base : join(env["HOME"] ?? homedir(), ".config"),
    "palebluedot",
    "config.json",
  );
}

/** Missing: no contexts. Throws PlatformError `config-invalid`, which quotes no content. */
export async function readContexts(path: string): Promise<ContextFile> {
  let text: string;
  try {
    text = await readFile(path, "utf8");
  } catch (cause) {
    if (cause instanceof Error && "code" in cause && cause.code === "ENOENT") return { contexts: {} };
    throw new PlatformError({
      code: "config-unreadable",
      kind: "invalid",
      message: `${path} cannot be read`,
      hint: "Check its owner and mode; it should belong to you with mode 0600.",
      cause,
    });
  }
  // It holds tokens: a backup restored with a wide mode is narrowed before it is used.
  const { mode } = await stat(path);
  if ((mode & 0o077) !== 0) await chmod(path, 0o600);
  const invalid = (): PlatformError =>
    new PlatformError({
      code: "config-invalid",
      kind: "invalid",
      message: `${path} is not a configuration of pbd`,
      hint: "Remove the file and run pbd login again.",
    });
  let value: unknown;
  try {
    value = JSON.parse(text);
  } catch {
    throw invalid();
  }
  const parsed = fileSchema.safeParse(value);
  if (!parsed.success) throw invalid();
  return parsed.data;
}

/** Replaces the file in one step, mode 0600 in a directory of mode 0700. */
export async function writeContexts(path: string, file: ContextFile): Promise<void> {
  await mkdir(dirname(path), { recursive: true, mode: 0o700 });
  const temporary = `${path}.${randomBytes(6).toString("hex")}`;
  await writeFile(temporary, `${JSON.stringify(file, null, 2)}\n`, { mode: 0o600, flag: "wx" });
  await rename(temporary, path);
}

/**
 * The context to use: `--context`, else PALEBLUEDOT_URL with PALEBLUEDOT_TOKEN or PALEBLUEDOT_TOKEN_FILE,
 * else the current one. Throws PlatformError `not-logged-in` or `context-not-found`.
 */
export async function resolveContext(env: Environment, path: string, name?: string): Promise<Context> {
  const url = env["PALEBLUEDOT_URL"];
  if (name === undefined && url !== undefined && url !== "") {
    const tokenFile = env["PALEBLUEDOT_TOKEN_FILE"];
    const token =
      env["PALEBLUEDOT_TOKEN"] ??
      (tokenFile === undefined ? undefined : (await readFile(tokenFile, "utf8")).trim());
    const parsed = contextSchema.safeParse({ url, token });
    if (parsed.success) return parsed.data;
    throw new PlatformError({
      code: "environment-invalid",
      kind: "invalid",
      message: "PALEBLUEDOT_URL is set, but it is no http(s) URL or there is no token with it",
      hint: "Set PALEBLUEDOT_TOKEN_FILE (or PALEBLUEDOT_TOKEN) too, or unset PALEBLUEDOT_URL.",
    });
  }
  const file = await readContexts(path);
  const wanted = name ?? file.current;
  const context = wanted === undefined ? undefined : file.contexts[wanted];
  if (context !== undefined) return context;
  if (name !== undefined) {
    throw new PlatformError({
      code: "context-not-found",
      kind: "not-found",
      message: `there is no context ${JSON.stringify(name)}`,
      hint: "pbd context list shows them; pbd login URL --name NAME makes one.",
    });
  }
  throw new PlatformError({
    code: "not-logged-in",
    kind: "unauthenticated",
    message: "pbd does not know a controller yet",
    hint: "Run pbd login URL, for example: pbd login https://controller.example:8080 --token-file admin-token",
  });
}
