import { readFile } from "node:fs/promises";
import { join } from "node:path";
import { PlatformError } from "@palebluedot/shared/errors.ts";
import { z } from "zod";
import { writeFileAtomic } from "./atomic-file.ts";
import type { DiskReserve } from "./disk-reserve.ts";

const tenantsSchema = z.array(z.string());
const fileSchema = z.object({
  version: z.literal(1),
  images: z.record(z.string(), tenantsSchema),
  references: z.record(z.string(), tenantsSchema),
});

/** More would be an attack: each is an image that was pulled with a credential. */
const maxEntries = 50_000;

/**
 * Who may use an image that is on this host without pulling it. One that came with a credential is usable by
 * the tenants that pulled it themselves; everything else (public, put there by the operator) by everybody.
 */
export interface ImageAccess {
  /** `reference` in its canonical form; `imageId` is what it leads to now. */
  mayUse(tenantId: string, reference: string, imageId: string): boolean;
  /** Everybody may use it. What is open does not become private by being pulled again. */
  isOpen(reference: string, imageId: string): boolean;
  /**
   * Before a pull with a credential: what it brings is nobody else's, also when the agent dies in between.
   * Throws `image-records-full`.
   */
  beginPrivatePull(reference: string): Promise<void>;
  /** A pull brought nothing: the reference is as it was. */
  endPrivatePull(reference: string): Promise<void>;
  /** The tenant's own pull succeeded. `isPrivate`: with a credential, and what it brought was not open before. */
  pulled(tenantId: string, reference: string, imageId: string, isPrivate: boolean): Promise<void>;
}

type Tenants = Map<string, Set<string>>;

const toTenants = (record: Record<string, string[]>): Tenants =>
  new Map(Object.entries(record).map(([key, tenants]) => [key, new Set(tenants)]));
const toRecord = (tenants: Tenants): Record<string, string[]> =>
  Object.fromEntries([...tenants].map(([key, set]) => [key, [...set]]));

async function readRecords(
  path: string,
): Promise<{ readonly images: Tenants; readonly references: Tenants }> {
  try {
    const stored = fileSchema.parse(JSON.parse(await readFile(path, "utf8")));
    return { images: toTenants(stored.images), references: toTenants(stored.references) };
  } catch (cause) {
    if ((cause as NodeJS.ErrnoException).code === "ENOENT")
      return { images: new Map(), references: new Map() };
    throw new PlatformError({
      code: "image-records-unreadable",
      kind: "internal",
      message: `${path} is unreadable`,
      hint: "It says which tenants' images are private. Remove those images from the engine, then the file.",
      cause,
    });
  }
}

/** Throws when the file exists and is unreadable: without it every private image would be everybody's. */
export async function createImageAccess(dataDir: string, disk: DiskReserve): Promise<ImageAccess> {
  const path = join(dataDir, "images.json");
  const { images, references } = await readRecords(path);
  let writing: Promise<void> = Promise.resolve();

  /** One write after the other, each with what is known when it begins. */
  function save(): Promise<void> {
    const saved = writing.then(() => {
      const content = { version: 1, images: toRecord(images), references: toRecord(references) };
      return disk.write(() => writeFileAtomic(path, `${JSON.stringify(content)}\n`));
    });
    writing = saved.catch(() => undefined);
    return saved;
  }

  return {
    mayUse(tenantId, reference, imageId) {
      const ofImage = images.get(imageId);
      if (ofImage !== undefined) return ofImage.has(tenantId);
      return references.get(reference)?.has(tenantId) ?? true;
    },
    isOpen: (reference, imageId) => !images.has(imageId) && !references.has(reference),
    async beginPrivatePull(reference) {
      if (references.has(reference)) return;
      if (images.size + references.size >= maxEntries) {
        throw new PlatformError({
          code: "image-records-full",
          kind: "unavailable",
          message: "this host holds too many private images",
          hint: "The operator removes images and images.json from the host.",
        });
      }
      references.set(reference, new Set());
      await save();
    },
    async endPrivatePull(reference) {
      if (references.get(reference)?.size !== 0) return;
      references.delete(reference);
      await save();
    },
    async pulled(tenantId, reference, imageId, isPrivate) {
      const ofReference = references.get(reference);
      let ofImage = images.get(imageId);
      if (!isPrivate && ofReference === undefined && ofImage === undefined) return;
      if (ofReference?.has(tenantId) !== false && ofImage?.has(tenantId) === true) return;
      ofReference?.add(tenantId);
      if (ofImage === undefined) images.set(imageId, (ofImage = new Set()));
      ofImage.add(tenantId);
      await save();
    },
  };
}
