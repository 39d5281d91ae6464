/**
 * What the NVIDIA driver's Xid numbers mean and what NVIDIA says to do first.
 *
 * Source: NVIDIA's Xid catalogue, https://docs.nvidia.com/deploy/xid-errors/analyzing-xid-catalog.html,
 * as of 2025-10-29, read through the generated table of leptonai/gpud (Apache-2.0). Numbers that are
 * absent here are unknown to the catalogue, not harmless.
 */

/** NVIDIA's immediate action; CHECK_CAUSE, CHECK_NVLINK and READ_RECOVERY_ACTION stand for its workflows. */
export type XidAction =
  | "IGNORE"
  | "RESTART_APP"
  | "RESET_GPU"
  | "RESTART_BM"
  | "RESTART_VM"
  | "CHECK_MECHANICALS"
  | "CHECK_CAUSE"
  | "CHECK_NVLINK"
  | "CHECK_UVM"
  | "READ_RECOVERY_ACTION"
  | "UPDATE_SWFW"
  | "CONTACT_SUPPORT";

export interface XidMeaning {
  readonly xid: number;
  readonly name: string;
  readonly action: XidAction;
}

const rows: readonly (readonly [xid: number, name: string, action: XidAction])[] = [
  [1, "Invalid or corrupted push buffer stream", "CONTACT_SUPPORT"],
  [2, "Invalid or corrupted push buffer stream", "CONTACT_SUPPORT"],
  [3, "Invalid or corrupted push buffer stream", "CONTACT_SUPPORT"],
  [4, "Invalid or corrupted push buffer stream", "CONTACT_SUPPORT"],
  [5, "ROBUST CHANNEL FIFO ERROR RUNOUT OVERFLOW", "CONTACT_SUPPORT"],
  [6, "Invalid or corrupted push buffer stream", "CONTACT_SUPPORT"],
  [7, "Invalid or corrupted push buffer address", "CONTACT_SUPPORT"],
  [8, "GPU stopped processing", "RESTART_APP"],
  [9, "Driver error programming GPU", "CONTACT_SUPPORT"],
  [10, "ROBUST CHANNEL GR ERROR SINGLE STEP", "CONTACT_SUPPORT"],
  [11, "Invalid or corrupted push buffer stream", "RESTART_APP"],
  [12, "Driver error handling GPU exception", "CONTACT_SUPPORT"],
  [13, "Graphics Engine Exception", "RESTART_APP"],
  [14, "ROBUST CHANNEL FAKE ERROR", "IGNORE"],
  [15, "ROBUST CHANNEL SCANLINE TIMEOUT", "CONTACT_SUPPORT"],
  [16, "Display engine hung", "CONTACT_SUPPORT"],
  [17, "ROBUST CHANNEL PARAMETER ERROR", "CONTACT_SUPPORT"],
  [18, "Bus mastering disabled in PCI Config Space", "CONTACT_SUPPORT"],
  [19, "Display Engine error", "CONTACT_SUPPORT"],
  [20, "Invalid or corrupted Mpeg push buffer", "CONTACT_SUPPORT"],
  [21, "Invalid or corrupted Motion Estimation push buffer", "CONTACT_SUPPORT"],
  [22, "Invalid or corrupted Video Processor push buffer", "CONTACT_SUPPORT"],
  [23, "ROBUST CHANNEL RC LOGGING ENABLED", "CONTACT_SUPPORT"],
  [24, "GPU semaphore timeout", "CONTACT_SUPPORT"],
  [25, "Invalid or illegal push buffer stream", "RESTART_APP"],
  [26, "Framebuffer timeout", "CONTACT_SUPPORT"],
  [27, "Video processor exception", "CONTACT_SUPPORT"],
  [28, "Video processor exception", "CONTACT_SUPPORT"],
  [29, "Video processor exception", "CONTACT_SUPPORT"],
  [30, "GPU semaphore access error", "CONTACT_SUPPORT"],
  [31, "GPU memory page fault", "RESTART_APP"],
  [32, "Invalid or corrupted push buffer stream", "RESTART_APP"],
  [33, "Internal micro-controller error", "CONTACT_SUPPORT"],
  [34, "Video processor exception", "CONTACT_SUPPORT"],
  [35, "Video processor exception", "CONTACT_SUPPORT"],
  [36, "Video processor exception", "CONTACT_SUPPORT"],
  [37, "Driver firmware error", "IGNORE"],
  [38, "Driver firmware error", "IGNORE"],
  [39, "Copy Engine Exception", "RESTART_APP"],
  [40, "Copy Engine Exception", "RESTART_APP"],
  [41, "Copy Engine Exception", "RESTART_APP"],
  [42, "Video processor exception", "CONTACT_SUPPORT"],
  [43, "GPU stopped processing", "IGNORE"],
  [44, "Graphics Engine fault during context switch", "IGNORE"],
  [
    45,
    "Preemptive cleanup, due to previous errors -- Most likely to see when running multiple cuda applications and hitting a DBE",
    "CHECK_CAUSE",
  ],
  [46, "GPU stopped processing", "RESET_GPU"],
  [47, "Video processor exception", "CONTACT_SUPPORT"],
  [48, "Double Bit ECC Error", "CHECK_CAUSE"],
  [49, "SILENT RUNNING CONSTANT LEVEL SET BY REGISTRY", "CONTACT_SUPPORT"],
  [50, "SILENT RUNNING LEVEL TRANSITION DUE TO RC ERROR", "CONTACT_SUPPORT"],
  [51, "SILENT RUNNING STRESS TEST FAILURE", "CONTACT_SUPPORT"],
  [52, "SILENT RUNNING LEVEL TRANS DUE TO TEMP RISE", "CONTACT_SUPPORT"],
  [53, "SILENT RUNNING TEMP REDUCED CLOCKING", "CONTACT_SUPPORT"],
  [54, "Auxiliary power is not connected to the GPU board", "CHECK_MECHANICALS"],
  [55, "SILENT RUNNING TEMPERATURE READ ERROR", "CONTACT_SUPPORT"],
  [56, "Display Engine error", "CONTACT_SUPPORT"],
  [57, "Error programming video memory interface", "CONTACT_SUPPORT"],
  [58, "Unstable video memory interface detected", "CONTACT_SUPPORT"],
  [59, "Internal micro-controller error (older drivers)", "CONTACT_SUPPORT"],
  [60, "Video processor exception", "RESTART_APP"],
  [61, "Internal micro-controller breakpoint/warning (newer drivers)", "CONTACT_SUPPORT"],
  [62, "Internal micro-controller halt (newer drivers)", "RESET_GPU"],
  [63, "GPU memory remapping event", "IGNORE"],
  [64, "GPU memory remapping failure", "RESET_GPU"],
  [65, "Video processor exception", "CONTACT_SUPPORT"],
  [66, "Illegal access by driver", "IGNORE"],
  [67, "Illegal access by driver", "IGNORE"],
  [68, "NVDEC0 Exception", "RESTART_APP"],
  [69, "Graphics Engine class error", "RESTART_APP"],
  [70, "CE3: Unknown Error", "RESTART_APP"],
  [71, "CE4: Unknown Error", "RESTART_APP"],
  [72, "CE5: Unknown Error", "RESTART_APP"],
  [73, "NVENC2 Error", "CONTACT_SUPPORT"],
  [74, "NVLINK Error", "CHECK_NVLINK"],
  [75, "CE6: Unknown Error", "RESTART_APP"],
  [76, "CE7: Unknown Error", "RESTART_APP"],
  [77, "CE8: Unknown Error", "RESTART_APP"],
  [78, "vGPU Start Error", "UPDATE_SWFW"],
  [79, "GPU has fallen off the bus", "RESTART_BM"],
  [80, "Corrupted data sent to GPU", "RESTART_APP"],
  [81, "VGA Subsystem Error", "CONTACT_SUPPORT"],
  [82, "NVJPG0 Error", "RESTART_APP"],
  [83, "NVDEC1 Error", "RESTART_APP"],
  [84, "NVDEC2 Error", "RESTART_APP"],
  [85, "CE9: Unknown Error", "RESTART_APP"],
  [86, "OFA Exception", "RESTART_APP"],
  [87, "NVTELEMETRY DRIVER REPORT", "CONTACT_SUPPORT"],
  [88, "NVDEC3 Error", "RESTART_APP"],
  [89, "NVDEC4 Error", "RESTART_APP"],
  [90, "LTC ERROR", "CONTACT_SUPPORT"],
  [91, "RESERVED XID", "CONTACT_SUPPORT"],
  [92, "High single-bit ECC error rate", "IGNORE"],
  [93, "Non-fatal violation of provisioned InfoROM wear limit", "IGNORE"],
  [94, "Contained memory error", "RESTART_APP"],
  [95, "Uncontained memory error", "RESET_GPU"],
  [96, "NVDEC5 Error", "RESTART_APP"],
  [97, "NVDEC6 Error", "RESTART_APP"],
  [98, "NVDEC7 Error", "RESTART_APP"],
  [99, "NVJPG1 Error", "RESTART_APP"],
  [100, "NVJPG2 Error", "RESTART_APP"],
  [101, "NVJPG3 Error", "RESTART_APP"],
  [102, "NVJPG4 Error", "RESTART_APP"],
  [103, "NVJPG5 Error", "RESTART_APP"],
  [104, "NVJPG6 Error", "RESTART_APP"],
  [105, "NVJPG7 Error", "RESTART_APP"],
  [106, "SMBPBI Test Message", "IGNORE"],
  [107, "SMBPBI Test Message Silent", "IGNORE"],
  [108, "NVLINK REMOTE TRANSLATION ERROR", "IGNORE"],
  [109, "Context Switch Timeout Error", "RESET_GPU"],
  [110, "Security Fault Error", "RESET_GPU"],
  [111, "Display Bundle Error Event", "CONTACT_SUPPORT"],
  [112, "Display Supervisor Error", "CONTACT_SUPPORT"],
  [113, "DP Link Training Error", "CONTACT_SUPPORT"],
  [114, "Display Pipeline Underflow Error", "CONTACT_SUPPORT"],
  [115, "Display Core Channel Error", "CONTACT_SUPPORT"],
  [116, "Display Window Channel Error", "CONTACT_SUPPORT"],
  [117, "Display Cursor Channel Error", "CONTACT_SUPPORT"],
  [118, "Display Pixel Pipeline Error", "CONTACT_SUPPORT"],
  [119, "GSP RPC Timeout", "RESET_GPU"],
  [120, "GSP Error", "RESET_GPU"],
  [121, "C2C Error", "IGNORE"],
  [122, "SPI PMU RPC Read Failure", "CONTACT_SUPPORT"],
  [123, "SPI PMU RPC Write Failure", "CONTACT_SUPPORT"],
  [124, "SPI PMU RPC Erase Failure", "CONTACT_SUPPORT"],
  [125, "Inforom FS Failure", "CONTACT_SUPPORT"],
  [126, "CE10: Unknown Error", "RESTART_APP"],
  [127, "CE11: Unknown Error", "RESTART_APP"],
  [128, "CE12: Unknown Error", "RESTART_APP"],
  [129, "CE13: Unknown Error", "RESTART_APP"],
  [130, "CE14: Unknown Error", "RESTART_APP"],
  [131, "CE15: Unknown Error", "RESTART_APP"],
  [132, "CE16: Unknown Error", "RESTART_APP"],
  [133, "CE17: Unknown Error", "RESTART_APP"],
  [134, "CE18: Unknown Error", "RESTART_APP"],
  [135, "CE19: Unknown Error", "RESTART_APP"],
  [136, "Link Training Failed", "RESET_GPU"],
  [137, "NVLink Privilege Error", "IGNORE"],
  [138, "ROBUST CHANNEL DLA ERROR", "CONTACT_SUPPORT"],
  [139, "OFA1 Error", "RESTART_APP"],
  [140, "ECC Unrecovered Error", "RESET_GPU"],
  [141, "CUDA Fast Path Error", "IGNORE"],
  [142, "NVENC3 Error", "CONTACT_SUPPORT"],
  [143, "GPU Initialization Error", "RESET_GPU"],
  [144, "NVLINK: SAW Error", "CHECK_NVLINK"],
  [145, "NVLINK: RLW Error", "CHECK_NVLINK"],
  [146, "NVLINK: TLW Error", "CHECK_NVLINK"],
  [147, "NVLINK: TREX Error", "CHECK_NVLINK"],
  [148, "NVLINK: NVLPW_CTRL Error", "CHECK_NVLINK"],
  [149, "NVLINK: NETIR Error", "CHECK_NVLINK"],
  [150, "NVLINK: MSE Error", "CHECK_NVLINK"],
  [151, "Key rotation Error", "RESTART_VM"],
  [152, "DLA SMMU Error", "IGNORE"],
  [153, "DLA timeout Error", "IGNORE"],
  [154, "GPU Recovery Action Changed", "READ_RECOVERY_ACTION"],
  [155, "NVLINK: SW Defined Error", "RESET_GPU"],
  [156, "Resource Retirement Event", "RESET_GPU"],
  [157, "Resource Retirement Failure", "IGNORE"],
  [158, "GPU Fatal Timeout", "RESET_GPU"],
  [159, "CHI Non-Data Error", "CHECK_UVM"],
  [160, "Channel Retirement Event", "IGNORE"],
  [161, "Channel Retirement Failure", "IGNORE"],
  [162, "Power Smoothing HW Circuitry capability reengaged", "CONTACT_SUPPORT"],
  [163, "Power Smoothing HW Circuitry capability disengaged", "CONTACT_SUPPORT"],
  [164, "Power Smoothing HW Circuitry low lifetime reached", "CONTACT_SUPPORT"],
  [165, "Power Smoothing HW Circuitry lifetime exhausted", "CONTACT_SUPPORT"],
  [166, "CC traffic seen prior to link properly being configured for encrypted traffic", "CONTACT_SUPPORT"],
  [167, "PCIE_FATAL_TIMEOUT", "CONTACT_SUPPORT"],
  [168, "Errors found in WPR (write protected region)", "CONTACT_SUPPORT"],
  [169, "Internal micro-controller halt", "CONTACT_SUPPORT"],
  [170, "Interrupt seen in CC mode", "CONTACT_SUPPORT"],
  [
    171,
    "Additional to Xid 48 providing more details on particulars of fault to differentiate DRAM/SRAM",
    "CONTACT_SUPPORT",
  ],
  [
    172,
    "Additional to Xid 48 providing more details on particulars of fault to differentiate DRAM/SRAM",
    "CONTACT_SUPPORT",
  ],
  [173, "C2C Fatal Link Failure", "CONTACT_SUPPORT"],
];

const meanings: ReadonlyMap<number, XidMeaning> = new Map(
  rows.map(([xid, name, action]) => [xid, { xid, name, action }]),
);

/** Undefined for a number that the catalogue does not hold: newer drivers add some. */
export function xidMeaning(xid: number): XidMeaning | undefined {
  return meanings.get(xid);
}

/** True where the GPU is not usable before somebody acts on it: reset, reboot, or hands. */
export function xidIsFatalToGpu(xid: number): boolean {
  const action = meanings.get(xid)?.action;
  return action === "RESET_GPU" || action === "RESTART_BM" || action === "CHECK_MECHANICALS";
}
