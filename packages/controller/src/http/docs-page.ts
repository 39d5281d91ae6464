import { z } from "zod";

/**
 * The API for people, rendered from the OpenAPI document. It needs no script and loads nothing, so it works
 * in a rack without a way out, and its content policy can forbid everything but its own style.
 */
const parameterSchema = z.looseObject({
  name: z.string(),
  in: z.string(),
  required: z.boolean().default(false),
  description: z.string().default(""),
  schema: z.unknown(),
});

const contentSchema = z.record(z.string(), z.looseObject({ schema: z.unknown() })).default({});

const operationSchema = z.looseObject({
  operationId: z.string(),
  summary: z.string().default(""),
  description: z.string().default(""),
  tags: z.array(z.string()).default([]),
  parameters: z.array(parameterSchema).default([]),
  requestBody: z.looseObject({ content: contentSchema }).optional(),
  responses: z.record(z.string(), z.looseObject({ description: z.string(), content: contentSchema })),
});

const documentSchema = z.looseObject({
  info: z.looseObject({ title: z.string(), version: z.string(), description: z.string().default("") }),
  paths: z.record(z.string(), z.record(z.string(), operationSchema)),
  components: z
    .looseObject({ schemas: z.record(z.string(), z.unknown()).default({}) })
    .default({ schemas: {} }),
});

type Operation = z.infer<typeof operationSchema>;

function escaped(text: string): string {
  return text
    .replaceAll("&", "&amp;")
    .replaceAll("<", "&lt;")
    .replaceAll(">", "&gt;")
    .replaceAll('"', "&quot;");
}

/** Back-ticked words as code; nothing else is markup. */
const prose = (text: string): string => escaped(text).replaceAll(/`([^`]+)`/g, "<code>$1</code>");

function schemaHtml(schema: unknown): string {
  const json = escaped(JSON.stringify(schema, null, 2) ?? "");
  const linked = json.replaceAll(
    /#\/components\/schemas\/([A-Za-z0-9]+)/g,
    '<a href="#schema-$1">#/components/schemas/$1</a>',
  );
  return `<pre>${linked}</pre>`;
}

function contentHtml(content: z.infer<typeof contentSchema>): string {
  return Object.entries(content)
    .map(([media, { schema }]) => `<p><code>${escaped(media)}</code></p>${schemaHtml(schema)}`)
    .join("");
}

function parametersHtml(operation: Operation): string {
  if (operation.parameters.length === 0) return "";
  const rows = operation.parameters.map(
    (parameter) =>
      `<tr><td><code>${escaped(parameter.name)}</code></td><td>${escaped(parameter.in)}${parameter.required ? ", required" : ""}</td>` +
      `<td>${prose(parameter.description)}</td><td><code>${escaped(JSON.stringify(parameter.schema) ?? "")}</code></td></tr>`,
  );
  return `<h4>Parameters</h4><table><tr><th>Name</th><th>In</th><th></th><th>Schema</th></tr>${rows.join("")}</table>`;
}

function operationHtml(path: string, method: string, operation: Operation): string {
  const responses = Object.entries(operation.responses).map(([status, response]) => {
    // Every problem has one schema; repeating it a dozen times would hide the rest.
    const isProblem = "application/problem+json" in response.content;
    return `<li><code>${escaped(status)}</code> ${prose(response.description)}${isProblem ? "" : contentHtml(response.content)}</li>`;
  });
  const body =
    operation.requestBody === undefined ? "" : `<h4>Body</h4>${contentHtml(operation.requestBody.content)}`;
  return (
    `<details id="${escaped(operation.operationId)}"><summary><b class="${escaped(method)}">${escaped(method.toUpperCase())}</b> ` +
    `<code>${escaped(path)}</code> <span>${prose(operation.summary)}</span></summary>` +
    operation.description
      .split("\n\n")
      .map((paragraph) => `<p>${prose(paragraph)}</p>`)
      .join("") +
    `${parametersHtml(operation)}${body}<h4>Answers</h4><ul>${responses.join("")}</ul></details>`
  );
}

const style = `
:root{color-scheme:light dark;font:16px/1.5 system-ui,sans-serif}
body{max-width:62rem;margin:2rem auto;padding:0 1rem}
h2{margin-top:2.5rem;border-bottom:1px solid #8886}
details{border:1px solid #8884;border-radius:.4rem;margin:.5rem 0;padding:.4rem .8rem}
summary{cursor:pointer}summary b{display:inline-block;min-width:4.2rem;font-family:monospace}
.get{color:#0a7a3d}.post{color:#1f5fbf}.patch,.put{color:#a15c00}.delete{color:#b3261e}
pre{overflow:auto;padding:.6rem;background:#8881;border-radius:.3rem;font-size:.85rem}
table{border-collapse:collapse;width:100%;font-size:.9rem}td,th{text-align:left;padding:.2rem .6rem;vertical-align:top;border-top:1px solid #8883}
td code{overflow-wrap:anywhere}`;

/** `document` is what openApiDocument made; the page is made anew for each call. */
export function docsPage(document: object): Response {
  // Through JSON, as a client would get it: the generator leaves undefined members behind.
  const api = documentSchema.parse(JSON.parse(JSON.stringify(document)));
  const byTag = new Map<string, string[]>();
  for (const [path, methods] of Object.entries(api.paths)) {
    for (const [method, operation] of Object.entries(methods)) {
      const tag = operation.tags[0] ?? "other";
      const list = byTag.get(tag) ?? [];
      list.push(operationHtml(path, method, operation));
      byTag.set(tag, list);
    }
  }
  const tags = [...byTag].map(([tag, operations]) => `<h2>${escaped(tag)}</h2>${operations.join("")}`);
  const schemas = Object.entries(api.components.schemas).map(
    ([name, schema]) =>
      `<details id="schema-${escaped(name)}"><summary><code>${escaped(name)}</code></summary>${schemaHtml(schema)}</details>`,
  );
  const html = `<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>${escaped(api.info.title)} API</title><style>${style}</style></head><body>
<h1>${escaped(api.info.title)} API <small>${escaped(api.info.version)}</small></h1>
<p>${prose(api.info.description)}</p>
<p>Machine-readable: <a href="/openapi.json">/openapi.json</a>. Send <code>Authorization: Bearer &lt;token&gt;</code>.</p>
${tags.join("\n")}<h2>schemas</h2>${schemas.join("\n")}</body></html>`;
  return new Response(html, {
    headers: {
      "content-type": "text/html; charset=utf-8",
      "content-security-policy": "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'",
      "cache-control": "max-age=60",
    },
  });
}
