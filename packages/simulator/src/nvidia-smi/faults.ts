/**
 * What can go wrong with a simulated server. `faults.json` in the state directory is the list of faults that
 * are in force; it is written by the functions of `../server.ts`, by the command, or by hand.
 */
import { readFileSync } from "node:fs";
import { paths } from "./state.ts";

interface FaultBase {
  /** Index or UUID of the GPU; without it every GPU, or the tool as a whole. */
  readonly gpu?: number | string | undefined;
  /** Milliseconds since the epoch; later the fault is over. */
  readonly until_ms?: number | undefined;
}

export const throttleReasons = [
  "applications_clocks_setting",
  "sw_power_cap",
  "hw_slowdown",
  "hw_thermal_slowdown",
  "hw_power_brake_slowdown",
  "sw_thermal_slowdown",
  "sync_boost",
] as const;
export type ThrottleReason = (typeof throttleReasons)[number];

export const recoveryActions = ["None", "Reset", "Reboot", "Drain P2P", "Drain and Reset"] as const;
type RecoveryAction = (typeof recoveryActions)[number];

export type Fault = FaultBase &
  (
    | {
        /** nvidia-smi never answers again; a process that hangs stays so after the fault is cleared. */
        readonly kind: "hang";
        readonly ignore_sigterm?: boolean | undefined;
        /** Only these: the streaming query, the one-shot query, the full XML, everything else. */
        readonly only?: readonly ("stream" | "query" | "xml" | "other")[] | undefined;
      }
    | { readonly kind: "slow"; readonly delay_ms: number }
    | { readonly kind: "driver-not-loaded" }
    | { readonly kind: "nvml-missing" }
    | { readonly kind: "version-mismatch" }
    | { readonly kind: "no-permission" }
    | {
        readonly kind: "lost";
        /**
         * `lost`: the tool stops at the GPU and exits 15. `unknown-error`: the same with exit 255.
         * `fields`: its row is there, its values read "[GPU is lost]". `absent`: it is not enumerated at all.
         */
        readonly form?: "lost" | "unknown-error" | "fields" | "absent" | undefined;
      }
    | { readonly kind: "reset-required" }
    | {
        readonly kind: "ecc";
        readonly dram_corrected?: number | undefined;
        readonly dram_uncorrected?: number | undefined;
        readonly sram_corrected?: number | undefined;
        readonly sram_uncorrected?: number | undefined;
        readonly sram_threshold_exceeded?: boolean | undefined;
      }
    | {
        readonly kind: "remapped-rows";
        readonly correctable?: number | undefined;
        readonly uncorrectable?: number | undefined;
        readonly pending?: boolean | undefined;
        readonly failure?: boolean | undefined;
      }
    | {
        readonly kind: "throttle";
        readonly reasons: readonly ThrottleReason[];
        readonly since_ms?: number | undefined;
      }
    | { readonly kind: "overheat"; readonly temperature_celsius: number }
    | { readonly kind: "recovery-action"; readonly action: RecoveryAction }
    | {
        readonly kind: "garbage";
        readonly form: "invalid-utf8" | "control-characters" | "truncated" | "long-line" | "endless";
      }
    | { readonly kind: "dirty"; readonly memory_mib: number }
    | { readonly kind: "exit"; readonly code: number; readonly message?: string | undefined }
  );

export type FaultKind = Fault["kind"];

/** The faults in force at `nowMs`. A missing or unreadable file is no fault: the tool must go on. */
export function readFaults(dir: string, nowMs: number): readonly Fault[] {
  let faults: unknown;
  try {
    faults = (JSON.parse(readFileSync(paths.faults(dir), "utf8")) as { faults?: unknown }).faults;
  } catch {
    return [];
  }
  if (!Array.isArray(faults)) return [];
  return (faults as Fault[]).filter(
    (fault) => typeof fault?.kind === "string" && (fault.until_ms === undefined || fault.until_ms > nowMs),
  );
}

/** The first fault of a kind, for one GPU or (without one) for the tool as a whole. */
export function findFault<K extends FaultKind>(
  faults: readonly Fault[],
  kind: K,
  gpu?: { readonly index: number; readonly uuid: string },
): Extract<Fault, { kind: K }> | undefined {
  return faults.find(
    (fault) =>
      fault.kind === kind &&
      (fault.gpu === undefined ||
        (gpu !== undefined && (String(fault.gpu) === String(gpu.index) || String(fault.gpu) === gpu.uuid))),
  ) as Extract<Fault, { kind: K }> | undefined;
}
