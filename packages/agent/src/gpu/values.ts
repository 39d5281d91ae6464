/** Single values as nvidia-smi prints them, in XML ("81559 MiB") and in CSV ("81559"). */

/** What nvidia-smi prints where it cannot tell. Compared in lower case, without brackets. */
const unavailableForms: ReadonlySet<string> = new Set([
  "",
  "n/a",
  "na",
  "none available",
  "not supported",
  "not available",
  "not active or supported",
  "insufficient permissions",
  "function not found",
  "requested functionality has been deprecated",
  "gpu requires reset",
  "gpu is lost",
  "unknown error",
  "unknown",
  "err!",
]);

/** True for "[N/A]", "GPU is lost", "" and the like: absent is not zero. */
function isUnavailable(text: string): boolean {
  const core = text.trim().replace(/^\[(.*)\]$/, "$1");
  return unavailableForms.has(core.trim().toLowerCase());
}

/** The two forms that mean the device itself has gone, not that it lacks a feature. */
export function saysGpuLost(text: string): boolean {
  return /gpu is lost/i.test(text);
}

export function saysGpuRequiresReset(text: string): boolean {
  return /gpu requires reset/i.test(text);
}

/** The text, or undefined where nvidia-smi could not tell. */
export function told(text: string | undefined): string | undefined {
  if (text === undefined) return undefined;
  const trimmed = text.trim();
  return isUnavailable(trimmed) ? undefined : trimmed;
}

/**
 * A number with an optional unit of the given names ("12 %", "700.00 W"). Anything else, also another
 * unit, is undefined: a wrong number is worse than none.
 */
export function quantity(text: string | undefined, ...units: readonly string[]): number | undefined {
  const value = told(text);
  if (value === undefined) return undefined;
  const match = /^(-?\d{1,18}(?:\.\d{1,9})?)\s*([^\d\s].*)?$/.exec(value);
  if (match?.[1] === undefined) return undefined;
  const unit = match[2]?.trim();
  if (unit !== undefined && !units.includes(unit)) return undefined;
  const number = Number(match[1]);
  return Number.isFinite(number) ? number : undefined;
}

/** A non-negative whole number; undefined beyond 2^53, where it would silently lose digits. */
export function count(text: string | undefined, ...units: readonly string[]): number | undefined {
  const value = quantity(text, ...units);
  return value !== undefined && value >= 0 && Number.isSafeInteger(value) ? value : undefined;
}

/** A non-negative whole number of what is measured in units: a driver that prints a fraction is rounded. */
export function wholeQuantity(text: string | undefined, ...units: readonly string[]): number | undefined {
  return uint32(quantity(text, ...units));
}

/** What a uint32 of the wire can hold, rounded; undefined for what it cannot (also NaN and below zero). */
export function uint32(value: number | undefined): number | undefined {
  const whole = uint64(value);
  return whole !== undefined && whole <= 0xffff_ffff ? whole : undefined;
}

/** The same for a uint64, up to 2^53: beyond that digits would be lost in silence. */
export function uint64(value: number | undefined): number | undefined {
  if (value === undefined) return undefined;
  const whole = Math.round(value);
  return whole >= 0 && Number.isSafeInteger(whole) ? whole : undefined;
}

/** Percent to 0..1; undefined outside of it. */
export function ratio(text: string | undefined): number | undefined {
  const value = quantity(text, "%");
  return value !== undefined && value >= 0 && value <= 100 ? value / 100 : undefined;
}

const bytesPerUnit: Readonly<Record<string, number>> = {
  B: 1,
  KiB: 1024,
  MiB: 1024 ** 2,
  GiB: 1024 ** 3,
};

/** Memory with its unit, in whole bytes; a bare number is MiB, as in CSV with `nounits`. */
export function memoryBytes(text: string | undefined): number | undefined {
  const value = quantity(text, ...Object.keys(bytesPerUnit));
  if (value === undefined) return undefined;
  const unit = /[A-Za-z]+$/.exec((text ?? "").trim())?.[0] ?? "MiB";
  return uint64(value * (bytesPerUnit[unit] ?? Number.NaN));
}

/** "Yes"/"No", "Enabled"/"Disabled", "Active"/"Not Active", "Pending", "1"/"0" and "True"/"False". */
export function flag(text: string | undefined): boolean | undefined {
  switch (told(text)?.toLowerCase() ?? "") {
    case "yes":
    case "enabled":
    case "active":
    case "true":
    case "pending":
    case "1":
      return true;
    case "no":
    case "disabled":
    case "not active":
    case "false":
    case "0":
      return false;
    default:
      return undefined;
  }
}

/** "0x0000000000000004" or decimal; masks are below 2^53. */
export function bitMask(text: string | undefined): number | undefined {
  const value = told(text);
  if (value === undefined || !/^(0x[0-9a-f]{1,16}|\d{1,16})$/i.test(value)) return undefined;
  const number = Number(value);
  return Number.isSafeInteger(number) ? number : undefined;
}

export function gpuUuid(text: string | undefined): string | undefined {
  const value = told(text);
  return value !== undefined && /^GPU-[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$/i.test(value)
    ? value
    : undefined;
}

/**
 * Brings every notation of a PCI address ("0000:18:00", "18:00.0", "00000000:18:00.0") to nvidia-smi's
 * own: 00000000:18:00.0 in upper case. Undefined for what is no address.
 */
export function pciBusId(text: string | undefined): string | undefined {
  const match = /^(?:PCI:)?(?:([0-9a-f]{4,8}):)?([0-9a-f]{2}):([0-9a-f]{2})(?:\.([0-7]))?$/i.exec(
    told(text) ?? "",
  );
  if (match === null) return undefined;
  const [, domain = "0", bus = "", device = "", fn = "0"] = match;
  return `${domain.padStart(8, "0")}:${bus}:${device}.${fn}`.toUpperCase();
}

/** Longest text that is passed on from a device: no name, version or message is longer. */
const maxTextLength = 256;

/**
 * Replaces control, format and invalid characters (also ANSI sequences) and bounds the length, so that a
 * broken or hostile device cannot forge log lines, break JSON consumers or grow memory.
 */
export function cleanText(text: string, maxLength: number = maxTextLength): string {
  return text
    .slice(0, maxLength * 4)
    .replace(ansiSequence, "")
    .replace(/[\p{Cc}\p{Cf}\p{Cs}\p{Co}\p{Zl}\p{Zp}]/gu, "\uFFFD")
    .replace(/\uFFFD+/g, "\uFFFD")
    .trim()
    .slice(0, maxLength);
}

const escape = String.fromCharCode(27);
const ansiSequence = new RegExp(`${escape}\\[[0-9;?]*[ -/]*[@-~]`, "g");

/** Removes ANSI sequences, which `topo -m` prints also into a pipe. */
export function withoutAnsi(text: string): string {
  return text.replace(ansiSequence, "");
}
