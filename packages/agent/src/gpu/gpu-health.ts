import type { Condition_Status } from "@palebluedot/shared/generated/palebluedot/agent/v1/agent.ts";
import { DEGRADED, FAILED, OK } from "./conditions.ts";
import type { GpuReading } from "./reading.ts";

export interface GpuVerdict {
  readonly status: Condition_Status;
  readonly reason: string;
  readonly message: string;
}

/**
 * Judges one GPU by its slow document. The worst finding wins. Thresholds are the ones NVIDIA documents
 * for row remapping and the SRAM error counter ("NVIDIA GPU Memory Error Management").
 */
export function judgeGpu(reading: GpuReading): GpuVerdict {
  if (reading.lost === true) {
    return failed("gpu-lost", "the driver lost the GPU; the host must be rebooted");
  }
  const action = recoveryAction(reading);
  if (action === "reset" || action === "reboot" || action === "drain-and-reset") {
    return failed(`recovery-${action}`, `the driver asks for: ${reading.recoveryAction ?? action}`);
  }
  if (reading.requiresReset === true || reading.resetRequired === true) {
    return failed("recovery-reset", "the driver says that the GPU requires a reset");
  }
  if (reading.remappedRowsFailure === true) {
    return failed("row-remap-failure", "a faulty memory row could not be remapped; replace the GPU");
  }
  if (reading.eccSramThresholdExceeded === true) {
    return failed("sram-threshold-exceeded", "too many uncorrectable SRAM errors; replace the GPU");
  }
  if (reading.unrepairableMemory === true) {
    return failed(
      "unrepairable-memory",
      "the driver reports memory that cannot be repaired; replace the GPU",
    );
  }
  if (action !== "none" && action !== undefined) {
    return degraded(`recovery-${action}`, `the driver asks for: ${reading.recoveryAction ?? action}`);
  }
  if (reading.remappedRowsPending === true || reading.retiredPagesPending === true) {
    return degraded("row-remap-pending", "a memory repair takes effect at the next reset; drain and reset");
  }
  if (reading.channelRepairPending === true || reading.tpcRepairPending === true) {
    return degraded("repair-pending", "a hardware repair takes effect at the next reset; drain and reset");
  }
  if ((reading.eccUncorrectedVolatile ?? 0) > 0) {
    const errors = String(reading.eccUncorrectedVolatile);
    return degraded("ecc-uncorrected", `${errors} uncorrected ECC errors since the driver was loaded`);
  }
  return { status: OK, reason: "ok", message: "" };
}

/**
 * In kebab-case: "none", "reset", "reboot", "drain-p2p", "drain-and-reset"; from gpu_recovery_action
 * (driver 570 and later) or the reset status before it. Undefined when neither was told.
 */
export function recoveryAction(reading: GpuReading): string | undefined {
  if (reading.recoveryAction !== undefined) {
    const words = reading.recoveryAction
      .toLowerCase()
      .replace(/[^a-z0-9]+/g, "-")
      .replace(/^-|-$/g, "");
    if (words.includes("drain") && words.includes("reset")) return "drain-and-reset";
    if (words.includes("reset")) return "reset";
    if (words.includes("reboot")) return "reboot";
    return words;
  }
  if (reading.drainAndResetRecommended === true) return "drain-and-reset";
  if (reading.resetRequired === true) return "reset";
  if (reading.resetRequired === false || reading.drainAndResetRecommended === false) return "none";
  return undefined;
}

function failed(reason: string, message: string): GpuVerdict {
  return { status: FAILED, reason, message };
}

function degraded(reason: string, message: string): GpuVerdict {
  return { status: DEGRADED, reason, message };
}
