import { readFile } from "node:fs/promises";

/** Identifies this boot, and when it was; "" and undefined where /proc does not tell. */
export async function readBoot(
  procRoot: string,
): Promise<{ readonly id: string; readonly timeUnixMs: number | undefined }> {
  const read = (file: string): Promise<string> => readFile(`${procRoot}/${file}`, "utf8").catch(() => "");
  const [id, stat] = await Promise.all([read("sys/kernel/random/boot_id"), read("stat")]);
  const seconds = /^btime (\d+)$/m.exec(stat)?.[1];
  return { id: id.trim(), timeUnixMs: seconds === undefined ? undefined : Number(seconds) * 1000 };
}
