import { BlockList, isIPv4 } from "node:net";
import { PlatformError } from "./errors.ts";

/** A container image's reference, taken apart. Nothing in it can be read as another path of the engine's API. */
export interface ImageReference {
  /** As the reference names it ("registry.example:5000"); undefined where it names none and the engine's default holds. */
  readonly registry: string | undefined;
  /** Registry and path, without tag and digest. */
  readonly name: string;
  /** Tag, or digest with its algorithm. Never empty: without one the engine would pull every tag there is. */
  readonly tag: string;
  /** Name with tag or digest: what the engine is asked about. */
  readonly canonical: string;
}

const maxLength = 512;
const hostLabel = "[a-zA-Z0-9](?:[a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?";
const registryPattern = new RegExp(`^${hostLabel}(?:\\.${hostLabel})*(?::(\\d{1,5}))?$`);
/** Separators only between letters and digits: no component is empty, "." or "..". */
const componentPattern = /^[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*$/;
const endPattern =
  /^(?<path>[^:@]+)(?::(?<tag>[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}))?(?:@(?<digest>[a-z0-9]+(?:[+._-][a-z0-9]+)*:[a-f0-9]{32,128}))?$/;

/** As engines do it: the first component is a registry when it cannot be a part of a path. */
const namesRegistry = (component: string): boolean => /[.:A-Z]/.test(component) || component === "localhost";

function isRegistry(text: string): boolean {
  const match = registryPattern.exec(text);
  if (!match || text.length > 255) return false;
  const port = match[1] === undefined ? undefined : Number(match[1]);
  return port === undefined || (port >= 1 && port <= 65_535);
}

function parse(reference: string): ImageReference | undefined {
  if (reference.length > maxLength) return undefined;
  const slash = reference.indexOf("/");
  const first = slash < 0 ? "" : reference.slice(0, slash);
  const registry = namesRegistry(first) ? first : undefined;
  if (registry !== undefined && !isRegistry(registry)) return undefined;
  const groups = endPattern.exec(registry === undefined ? reference : reference.slice(slash + 1))?.groups;
  const path = groups?.["path"];
  if (groups === undefined || path === undefined) return undefined;
  if (!path.split("/").every((component) => componentPattern.test(component))) return undefined;
  const name = registry === undefined ? path : `${registry}/${path}`;
  const { tag, digest } = groups;
  const chosen = digest ?? tag ?? "latest";
  const canonical = digest === undefined ? `${name}:${chosen}` : `${name}@${digest}`;
  return { registry, name, tag: chosen, canonical };
}

export const isImageReference = (text: string): boolean => parse(text) !== undefined;

/** Throws PlatformError `refused-image-reference`. */
export function parseImageReference(reference: string): ImageReference {
  const parsed = parse(reference);
  if (parsed) return parsed;
  throw new PlatformError({
    code: "refused-image-reference",
    kind: "invalid",
    message: `${JSON.stringify(reference.slice(0, 200))} is no image reference`,
    hint: "registry.example.com/team/image:tag, or the same with @sha256:...",
  });
}

const hostLocal = new BlockList();
hostLocal.addSubnet("127.0.0.0", 8);
hostLocal.addSubnet("0.0.0.0", 8);
// Link-local: where clouds serve a host's own credentials.
hostLocal.addSubnet("169.254.0.0", 16);

/**
 * The registry is the host itself or its link: pulling from there would make the engine, with the host's
 * identity, ask services that tenants cannot reach. Names are not resolved: they may lead there as well.
 */
export function isHostLocalRegistry(registry: string): boolean {
  let host: string;
  try {
    // Also of the other spellings of an IPv4 address: 127.1, 0x7f.0.0.1, 2130706433.
    host = new URL(`http://${registry}/`).hostname.replace(/\.$/, "");
  } catch {
    return true;
  }
  if (host === "localhost" || host.endsWith(".localhost")) return true;
  return isIPv4(host) && hostLocal.check(host);
}
