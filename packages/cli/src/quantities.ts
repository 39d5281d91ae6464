import { PlatformError } from "@palebluedot/shared/errors.ts";

const secondsPer = { s: 1, m: 60, h: 3600, d: 86_400, w: 604_800 } as const;
const bytesPer = { "": 1, k: 1024, m: 1024 ** 2, g: 1024 ** 3, t: 1024 ** 4 } as const;

function invalid(code: string, text: string, hint: string): PlatformError {
  return new PlatformError({
    code,
    kind: "invalid",
    message: `${JSON.stringify(text)} is not understood`,
    hint,
  });
}

/** "8h", "1h30m", "45s", "7d", or plain seconds, to seconds. Throws PlatformError `duration-invalid`. */
export function parseDurationSeconds(text: string): number {
  if (/^\d{1,9}$/.test(text)) return Number(text);
  const parts = [...text.matchAll(/(\d{1,9})([smhdw])/g)];
  if (parts.length === 0 || parts.map((part) => part[0]).join("") !== text) {
    throw invalid("duration-invalid", text, "A duration is written 8h, 1h30m, 45s or 7d.");
  }
  return parts.reduce(
    (sum, [, amount, unit]) => sum + Number(amount) * secondsPer[unit as keyof typeof secondsPer],
    0,
  );
}

/** "80Gi", "80GiB", "512M", or plain bytes, to bytes; all units are binary. Throws PlatformError `size-invalid`. */
export function parseBytes(text: string): number {
  const match = /^(\d{1,15}(?:\.\d{1,3})?)([kmgt]?)i?b?$/i.exec(text);
  const unit = match?.[2]?.toLowerCase() as keyof typeof bytesPer | undefined;
  if (match === null || unit === undefined) {
    throw invalid("size-invalid", text, "A size is written 80Gi, 512Mi or as bytes; units are binary.");
  }
  return Math.round(Number(match[1]) * bytesPer[unit]);
}

/** For tables: "80.0 GiB". */
export function formatBytes(bytes: number): string {
  const units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
  let value = bytes;
  let unit = 0;
  while (value >= 1024 && unit < units.length - 1) {
    value /= 1024;
    unit += 1;
  }
  return unit === 0 ? `${value} B` : `${value.toFixed(1)} ${units[unit]}`;
}

/** For tables: "3d", "2h", "5m", "12s"; rounded down. Negative spans read as "0s". */
export function formatSpan(milliseconds: number): string {
  const seconds = Math.max(0, Math.floor(milliseconds / 1000));
  if (seconds >= 2 * 86_400) return `${Math.floor(seconds / 86_400)}d`;
  if (seconds >= 2 * 3600) return `${Math.floor(seconds / 3600)}h`;
  if (seconds >= 120) return `${Math.floor(seconds / 60)}m`;
  return `${seconds}s`;
}
