import { readFile } from "node:fs/promises";
import { PlatformError } from "@palebluedot/shared/errors.ts";
import { z } from "zod";
import { createApiClient } from "../api.ts";
import { defineCommand } from "../command.ts";
import { readContexts, writeContexts, type Context } from "../contexts.ts";

const whoAmI = z.looseObject({ role: z.string(), tenant_name: z.string().nullish(), token_name: z.string() });

function isLoopback(hostname: string): boolean {
  return hostname === "localhost" || hostname === "[::1]" || /^127(\.\d{1,3}){3}$/.test(hostname);
}

export const login = defineCommand({
  path: ["login"],
  description: "Check a token with a controller and keep both",
  arguments: [{ name: "url", description: "address of the controller's REST API" }],
  options: [
    { flags: "--token-file <file>", description: 'file that holds the token; "-": standard input' },
    { flags: "--name <name>", description: "name of the context (default: the host)" },
    { flags: "--ca-file <file>", description: "PEM of the authority behind the controller's certificate" },
    {
      flags: "--allow-plain-http",
      description: "send the token unencrypted to a controller on another host",
    },
  ],
  examples: [
    "pbd login http://127.0.0.1:8080 --token-file admin-token",
    "pbd login https://controller.example:8080 --ca-file ca.pem < token",
  ],
  input: z.object({
    url: z.url({ protocol: /^https?$/, error: "an http:// or https:// address" }),
    tokenFile: z.string().optional(),
    name: z
      .string()
      .regex(/^[\w.-]{1,64}$/, "letters, digits, dots and dashes")
      .optional(),
    caFile: z.string().optional(),
    allowPlainHttp: z.boolean().default(false),
  }),
  async run(context, input) {
    const url = new URL(input.url);
    if (url.username !== "" || url.password !== "") {
      throw new PlatformError({
        code: "url-invalid",
        kind: "invalid",
        message: "the address holds credentials",
        hint: "Give the token by --token-file or standard input.",
      });
    }
    if (url.protocol === "http:" && !isLoopback(url.hostname) && !input.allowPlainHttp) {
      throw new PlatformError({
        code: "plain-http-refused",
        kind: "invalid",
        message: `the token would cross the network unencrypted to ${url.hostname}`,
        hint: "Use https://, or --allow-plain-http inside a network you trust.",
      });
    }
    // Never from argv: other users of the host can read that.
    let token: string;
    if (input.tokenFile !== undefined && input.tokenFile !== "-") {
      token = await readFile(input.tokenFile, "utf8").catch((cause: unknown) => {
        throw new PlatformError({
          code: "token-file-unreadable",
          kind: "invalid",
          message: `${input.tokenFile} cannot be read`,
          hint: "The controller writes its first token to admin-token in its data directory.",
          cause,
        });
      });
    } else if (input.tokenFile === undefined && context.promptHidden !== undefined) {
      token = await context.promptHidden("Token: ");
    } else {
      token = await context.readInput();
    }
    token = token.trim();
    if (!/^[\x21-\x7e]+$/.test(token)) {
      throw new PlatformError({
        code: "token-invalid",
        kind: "invalid",
        message: token === "" ? "there is no token" : "the token holds characters that no token has",
        hint: "Give it by --token-file, standard input or at the prompt.",
      });
    }
    const entry: Context = {
      url: input.url.replace(/\/+$/, ""),
      token,
      ...(input.caFile === undefined ? {} : { ca_pem: await readFile(input.caFile, "utf8") }),
    };
    const me = await createApiClient(entry).call("GET", "whoami", whoAmI);
    const name = input.name ?? url.host.replaceAll(/[^\w.-]/g, "-");
    const file = await readContexts(context.contextFile);
    await writeContexts(context.contextFile, {
      current: name,
      contexts: { ...file.contexts, [name]: entry },
    });
    const tenant =
      me.tenant_name === undefined || me.tenant_name === null ? "" : ` of tenant ${me.tenant_name}`;
    context.output.note(`Logged in to ${entry.url} as ${me.role}${tenant}; context ${name}.`);
  },
});

const contextColumns = [
  { header: "current", value: (row: { current: boolean }) => (row.current ? "*" : "") },
  { header: "name", value: (row: { name: string }) => row.name },
  { header: "url", value: (row: { url: string }) => row.url },
];

export const contextList = defineCommand({
  path: ["context", "list"],
  description: "Show the controllers you logged in to",
  input: z.object({}),
  async run({ output, contextFile }) {
    const file = await readContexts(contextFile);
    const rows = Object.entries(file.contexts).map(([name, { url }]) => ({
      name,
      url,
      current: name === file.current,
    }));
    output.list(
      rows,
      contextColumns.map(({ header, value }) => ({
        header,
        value: (row: (typeof rows)[number]) => value(row),
      })),
    );
  },
});

export const contextUse = defineCommand({
  path: ["context", "use"],
  description: "Choose the controller for the next commands",
  arguments: [{ name: "name", description: "a name of pbd context list" }],
  input: z.object({ name: z.string() }),
  async run({ output, contextFile }, { name }) {
    const file = await readContexts(contextFile);
    if (!Object.hasOwn(file.contexts, name)) {
      throw new PlatformError({
        code: "context-not-found",
        kind: "not-found",
        message: `there is no context ${JSON.stringify(name)}`,
        hint: "pbd context list shows them; pbd login URL --name NAME makes one.",
      });
    }
    await writeContexts(contextFile, { ...file, current: name });
    output.note(`Context ${name}: ${file.contexts[name]?.url}`);
  },
});
