/**
 * Hardware identity as machines tell it, brought to one form. Firmware ships placeholders where a vendor
 * forgot to program a serial; a placeholder identifies nobody, so it becomes "" and never matches a record.
 */

/** Compared after lower-casing and collapsing white space. Seen in DMI tables of real boards and VMs. */
const placeholderSerials: ReadonlySet<string> = new Set([
  "to be filled by o.e.m.",
  "to be filled by oem",
  "to be filled",
  "filled by o.e.m.",
  "o.e.m.",
  "oem",
  "default string",
  "default",
  "not specified",
  "not available",
  "not applicable",
  "not settable",
  "not present",
  "none",
  "null",
  "nil",
  "n/a",
  "na",
  "unknown",
  "undefined",
  "empty",
  "invalid",
  "system serial number",
  "chassis serial number",
  "base board serial number",
  "baseboard serial number",
  "board serial number",
  "serial number",
  "system product name",
  "system manufacturer",
  "system version",
  "system name",
  "sn",
  "ssn",
  "xxx",
  "0123456789",
  "1234567890",
  "123456789",
  "12345678",
  "1234567",
  "123456",
  "012345678",
  "01234567",
  "012345678910",
  "0123456789abcdef",
  "123456789012",
  "abcdefgh",
  "srl",
  "tbd",
  "type2 - board serial number",
]);

/** UUIDs that whole product lines share. Lower case. */
const placeholderUuids: ReadonlySet<string> = new Set([
  "00000000-0000-0000-0000-000000000000",
  "ffffffff-ffff-ffff-ffff-ffffffffffff",
  // AMI's default, in both byte orders that firmware prints.
  "03000200-0400-0500-0006-000700080009",
  "00020003-0004-0005-0006-000700080009",
  "12345678-1234-5678-90ab-cddeefaabbcc",
  "78563412-3412-7856-90ab-cddeefaabbcc",
  "01234567-89ab-cdef-0123-456789abcdef",
  "00112233-4455-6677-8899-aabbccddeeff",
  "fefefefe-fefe-fefe-fefe-fefefefefefe",
  "4c4c4544-0000-2010-8020-80c04f202020",
]);

/** Longest serial that is believed: SMBIOS strings are shorter, and a database column needs a bound. */
const maxSerialLength = 128;

/** White space, and control, format and other invisible characters that break logs and comparisons. */
const invisible = /[\p{Cc}\p{Cf}\p{Zl}\p{Zp}\uFFFD]/gu;

/**
 * Trims and collapses white space; returns "" for placeholders, for a single repeated character
 * ("000000", "........", "xxxxxxxx") and for anything without a letter or digit. Case is kept: vendors
 * print serials in upper case, and it is what stands on the label.
 */
export function normaliseSerial(raw: string | undefined): string {
  const text = (raw ?? "").replace(invisible, " ").replace(/\s+/g, " ").trim();
  if (text.length > maxSerialLength || !/[\p{L}\p{N}]/u.test(text)) return "";
  const key = text.toLowerCase();
  if (placeholderSerials.has(key)) return "";
  const symbols = key.replace(/[^\p{L}\p{N}]/gu, "");
  if (new Set(symbols).size === 1 && (symbols.length > 1 || symbols === "0")) return "";
  return text;
}

/**
 * Lower-case 8-4-4-4-12 form, also from 32 hexadecimal digits or with braces; "" for placeholders, for
 * UUIDs of one repeated digit, and for what is no UUID.
 */
export function normaliseUuid(raw: string | undefined): string {
  const hex = (raw ?? "")
    .replace(invisible, "")
    .trim()
    .replace(/^(urn:uuid:|\{)|\}$/gi, "")
    .toLowerCase();
  const match = /^([0-9a-f]{8})-?([0-9a-f]{4})-?([0-9a-f]{4})-?([0-9a-f]{4})-?([0-9a-f]{12})$/.exec(hex);
  if (match === null) return "";
  const uuid = match.slice(1).join("-");
  if (placeholderUuids.has(uuid) || new Set(uuid.replaceAll("-", "")).size === 1) return "";
  return uuid;
}

/**
 * Lower-case colon form of a unicast MAC address, from colon, dash, dot (Cisco) or bare notation; "" for
 * all-zero, broadcast and multicast addresses, and for what is no 48-bit MAC.
 */
export function normaliseMac(raw: string | undefined): string {
  const text = (raw ?? "").replace(invisible, "").trim().toLowerCase();
  const known =
    /^[0-9a-f]{2}([:-][0-9a-f]{2}){5}$/.test(text) ||
    /^[0-9a-f]{4}(\.[0-9a-f]{4}){2}$/.test(text) ||
    /^[0-9a-f]{12}$/.test(text);
  if (!known) return "";
  const hex = text.replace(/[^0-9a-f]/g, "");
  if (hex === "000000000000" || (Number.parseInt(hex.slice(0, 2), 16) & 1) === 1) return "";
  return (hex.match(/../g) ?? []).join(":");
}
