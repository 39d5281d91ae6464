import { PlatformError } from "@palebluedot/shared/errors.ts";

export interface ImageReference {
  /** Registry and path, without tag and digest. */
  readonly name: string;
  /** Tag, or digest with its algorithm. Never empty: without one the engine would pull every tag there is. */
  readonly tag: string;
}

const pattern =
  /^(?<name>(?:[a-zA-Z0-9](?:[a-zA-Z0-9.-]{0,252})(?::\d{1,5})?\/)?[a-z0-9]+(?:[._/-]+[a-z0-9]+)*)(?::(?<tag>[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}))?(?:@(?<digest>[a-z0-9+._-]+:[a-f0-9]{32,128}))?$/;

/** Throws PlatformError `refused-image-reference`. */
export function parseImageReference(reference: string): ImageReference {
  const groups = reference.length <= 512 ? pattern.exec(reference)?.groups : undefined;
  if (groups?.["name"] === undefined) {
    throw new PlatformError({
      code: "refused-image-reference",
      kind: "invalid",
      message: `${JSON.stringify(reference.slice(0, 200))} is no image reference`,
      hint: "registry.example.com/team/image:tag, or the same with @sha256:...",
    });
  }
  return { name: groups["name"], tag: groups["digest"] ?? groups["tag"] ?? "latest" };
}
