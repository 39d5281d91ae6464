import { PlatformError } from "@palebluedot/shared/errors.ts";

export const maxBodyBytes = 1024 * 1024;
const maxDepth = 32;

function invalid(code: string, message: string, hint: string, status = 400): PlatformError {
  return new PlatformError({ code, kind: "invalid", status, message, hint });
}

function tooLarge(): PlatformError {
  return new PlatformError({
    code: "body-too-large",
    kind: "too-large",
    message: `the body is larger than ${maxBodyBytes} bytes`,
    hint: "Put big data into the image or a volume, not into the request.",
  });
}

async function readLimited(request: Request): Promise<Uint8Array> {
  const declared = Number(request.headers.get("content-length") ?? "0");
  if (declared > maxBodyBytes) throw tooLarge();
  if (request.body === null) return new Uint8Array();
  const chunks: Uint8Array[] = [];
  let size = 0;
  const reader = request.body.getReader();
  for (;;) {
    const { done, value } = await reader.read();
    if (done) break;
    // The stream of a node request is typed loosely; it carries bytes.
    const chunk = value as Uint8Array;
    size += chunk.byteLength;
    if (size > maxBodyBytes) {
      // Not awaited: cancelling waits for a client that may never finish sending.
      void reader.cancel().catch(() => undefined);
      throw tooLarge();
    }
    chunks.push(chunk);
  }
  return Buffer.concat(chunks);
}

/** The JSON body of a request. Undefined when there is none at all. Throws PlatformErrors of kind invalid. */
export async function readJsonBody(request: Request): Promise<unknown> {
  const bytes = await readLimited(request);
  if (bytes.byteLength === 0) return undefined;
  const contentType = request.headers.get("content-type") ?? "";
  if (!/^application\/(json|[a-z0-9.+-]+\+json)\s*(;\s*charset="?utf-8"?\s*)?$/i.test(contentType.trim())) {
    throw invalid(
      "unsupported-media-type",
      contentType === "" ? "the request does not say what its body is" : "the body is not declared as JSON",
      "Send Content-Type: application/json.",
      415,
    );
  }
  let text: string;
  try {
    text = new TextDecoder("utf-8", { fatal: true, ignoreBOM: false }).decode(bytes);
  } catch {
    throw invalid("invalid-utf8", "the body is not valid UTF-8", "JSON is sent as UTF-8 (RFC 8259).");
  }
  let value: unknown;
  try {
    value = JSON.parse(text) as unknown;
  } catch (error) {
    const position = /position (\d+)/.exec(error instanceof Error ? error.message : "")?.[1];
    throw invalid(
      "invalid-json",
      `the body is not JSON${position === undefined ? "" : ` (at character ${position})`}`,
      "Check quotes and commas, e.g. with jq.",
    );
  }
  checkText(value, 0);
  return value;
}

/** Text that no database or terminal can hold is refused for every field at once. */
function checkText(value: unknown, depth: number): void {
  if (depth > maxDepth) {
    throw invalid("nested-too-deep", `the body is nested deeper than ${maxDepth} levels`, "Flatten it.");
  }
  if (typeof value === "string") {
    if (!isStorable(value)) throw invalidText();
  } else if (Array.isArray(value)) {
    for (const item of value) checkText(item, depth + 1);
  } else if (typeof value === "object" && value !== null) {
    for (const [key, item] of Object.entries(value)) {
      if (!isStorable(key)) throw invalidText();
      checkText(item, depth + 1);
    }
  }
}

/** False for text with NUL or half a surrogate pair: PostgreSQL stores neither. */
export function isStorable(text: string): boolean {
  return !text.includes("\0") && text.isWellFormed();
}

export function invalidText(): PlatformError {
  return invalid(
    "invalid-text",
    "a text holds a NUL character or half a surrogate pair",
    "Remove \\u0000 and unpaired \\ud800-\\udfff from the request.",
  );
}
