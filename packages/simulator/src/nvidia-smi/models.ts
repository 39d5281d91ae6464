/**
 * The GPU models a simulated server can have: figures a datasheet or a device of that model states, never
 * the identity of a recorded device. Memory in MiB, power in W, clocks in MHz, temperatures in degrees C.
 */
export const modelNames = ["h100", "h200", "b200", "a100", "l40s", "t4"] as const;
export type ModelName = (typeof modelNames)[number];

export interface GpuModel {
  readonly name: string;
  readonly architecture: string;
  /** PCI device and vendor as nvidia-smi prints them, e.g. 233010DE. */
  readonly pciDeviceId: string;
  readonly pciSubSystemId: string;
  readonly memoryTotalMib: number;
  readonly memoryReservedMib: number;
  readonly bar1TotalMib: number;
  readonly computeCapability: string;
  readonly powerIdleWatts: number;
  readonly powerLimitWatts: number;
  readonly powerMinimumWatts: number;
  readonly temperatureIdle: number;
  readonly temperatureLoad: number;
  readonly hasMemoryTemperature: boolean;
  /** The offset to the slow-down point, on models that report it; the others report absolute thresholds. */
  readonly temperatureLimits:
    | {
        readonly kind: "tlimit";
        readonly base: number;
        readonly shutdown: number;
        readonly slowdown: number;
      }
    | { readonly kind: "absolute"; readonly shutdown: number; readonly slowdown: number };
  readonly memoryMaximumTemperature: number | undefined;
  readonly maximumOperatingTemperature: number;
  readonly clockIdle: number;
  readonly clockMaximum: number;
  readonly clockStep: number;
  readonly memoryClock: number;
  readonly videoClockIdle: number;
  readonly videoClockMaximum: number;
  readonly idlePerformanceState: string;
  readonly vbios: string;
  readonly boardPartNumber: string;
  readonly gpuPartNumber: string;
  readonly inforomImage: string;
  readonly inforomOem: string;
  readonly inforomEcc: string;
  readonly hasInforomFlush: boolean;
  readonly pcieGeneration: number;
  readonly mig: boolean;
  readonly fabric: boolean;
  readonly fabricHealth: boolean;
  readonly c2c: boolean;
  readonly sparseOperationMode: boolean;
  readonly memoryPower: boolean;
  readonly powerSmoothing: "N/A" | "Insufficient Permissions";
  readonly edppMultiplier: boolean;
  readonly atomicCapabilities: string;
  readonly platformKnown: boolean;
  /** Undefined: the model retires pages instead of remapping rows. */
  readonly remapBanks: number | undefined;
  readonly nvlinks: number;
  readonly addressingMode: string;
  readonly graphicsVoltage: string;
  /** Chassis a server with this model commonly is. */
  readonly chassis: { readonly manufacturer: string; readonly product: string };
  readonly buses: readonly number[];
}

const hgxBuses = [0x1b, 0x43, 0x52, 0x61, 0x9d, 0xc3, 0xd1, 0xdf];
const pcieBuses = [0x21, 0x31, 0x41, 0x51, 0xa1, 0xb1, 0xc1, 0xd1];

const h100: GpuModel = {
  name: "NVIDIA H100 80GB HBM3",
  architecture: "Hopper",
  pciDeviceId: "233010DE",
  pciSubSystemId: "16C110DE",
  memoryTotalMib: 81559,
  memoryReservedMib: 480,
  bar1TotalMib: 131072,
  computeCapability: "9.0",
  powerIdleWatts: 70,
  powerLimitWatts: 700,
  powerMinimumWatts: 200,
  temperatureIdle: 31,
  temperatureLoad: 68,
  hasMemoryTemperature: true,
  temperatureLimits: { kind: "tlimit", base: 87, shutdown: -8, slowdown: -2 },
  memoryMaximumTemperature: 0,
  maximumOperatingTemperature: 87,
  clockIdle: 345,
  clockMaximum: 1980,
  clockStep: 15,
  memoryClock: 2619,
  videoClockIdle: 765,
  videoClockMaximum: 1545,
  idlePerformanceState: "P0",
  vbios: "96.00.99.00.01",
  boardPartNumber: "692-2G520-0200-000",
  gpuPartNumber: "2330-885-A1",
  inforomImage: "G520.0200.00.05",
  inforomOem: "2.1",
  inforomEcc: "7.16",
  hasInforomFlush: true,
  pcieGeneration: 5,
  mig: true,
  fabric: true,
  fabricHealth: false,
  c2c: true,
  sparseOperationMode: true,
  memoryPower: true,
  powerSmoothing: "N/A",
  edppMultiplier: true,
  atomicCapabilities: "N/A",
  platformKnown: false,
  remapBanks: 2560,
  nvlinks: 18,
  addressingMode: "HMM",
  graphicsVoltage: "670.000 mV",
  chassis: { manufacturer: "Palebluedot Simulated", product: "HGX H100 8-GPU" },
  buses: hgxBuses,
};

const ampere = {
  architecture: "Ampere",
  c2c: false,
  sparseOperationMode: false,
  memoryPower: false,
  edppMultiplier: false,
  fabric: false,
  inforomEcc: "6.16",
  pcieGeneration: 4,
} as const;

export const models: Readonly<Record<ModelName, GpuModel>> = {
  h100,
  h200: {
    ...h100,
    name: "NVIDIA H200",
    pciDeviceId: "233510DE",
    pciSubSystemId: "18BE10DE",
    memoryTotalMib: 143771,
    memoryReservedMib: 614,
    bar1TotalMib: 262144,
    memoryClock: 3201,
    vbios: "96.00.A5.00.03",
    boardPartNumber: "692-2G520-0280-000",
    gpuPartNumber: "2335-885-A1",
    inforomImage: "G520.0280.02.02",
    remapBanks: 3072,
    chassis: { manufacturer: "Palebluedot Simulated", product: "HGX H200 8-GPU" },
  },
  b200: {
    ...h100,
    name: "NVIDIA B200",
    architecture: "Blackwell",
    pciDeviceId: "290110DE",
    pciSubSystemId: "199910DE",
    memoryTotalMib: 183359,
    memoryReservedMib: 728,
    bar1TotalMib: 262144,
    computeCapability: "10.0",
    powerIdleWatts: 190,
    powerLimitWatts: 1000,
    temperatureIdle: 34,
    temperatureLoad: 70,
    temperatureLimits: { kind: "tlimit", base: 88, shutdown: -5, slowdown: -3 },
    maximumOperatingTemperature: 88,
    clockIdle: 120,
    clockMaximum: 1965,
    memoryClock: 3996,
    videoClockIdle: 600,
    videoClockMaximum: 1965,
    vbios: "97.00.FA.00.09",
    boardPartNumber: "692-2G525-0220-500",
    gpuPartNumber: "2901-886-A1",
    inforomImage: "G525.0220.00.03",
    hasInforomFlush: false,
    fabricHealth: true,
    sparseOperationMode: false,
    powerSmoothing: "Insufficient Permissions",
    atomicCapabilities: "FETCHADD_32 FETCHADD_64 SWAP_32 SWAP_64 CAS_32 CAS_64 ",
    platformKnown: true,
    remapBanks: 3840,
    addressingMode: "None",
    chassis: { manufacturer: "Palebluedot Simulated", product: "HGX B200 8-GPU" },
  },
  a100: {
    ...h100,
    ...ampere,
    name: "NVIDIA A100-SXM4-80GB",
    pciDeviceId: "20B210DE",
    pciSubSystemId: "147F10DE",
    memoryTotalMib: 81920,
    memoryReservedMib: 869,
    computeCapability: "8.0",
    powerIdleWatts: 60,
    powerLimitWatts: 400,
    powerMinimumWatts: 100,
    temperatureIdle: 29,
    temperatureLoad: 64,
    temperatureLimits: { kind: "absolute", shutdown: 92, slowdown: 89 },
    memoryMaximumTemperature: 95,
    maximumOperatingTemperature: 85,
    clockIdle: 210,
    clockMaximum: 1410,
    memoryClock: 1593,
    videoClockIdle: 585,
    videoClockMaximum: 1290,
    vbios: "92.00.36.00.02",
    boardPartNumber: "692-2G506-0212-002",
    gpuPartNumber: "20B2-895-A1",
    inforomImage: "G506.0212.00.01",
    inforomOem: "2.0",
    hasInforomFlush: false,
    remapBanks: 640,
    nvlinks: 12,
    addressingMode: "None",
    graphicsVoltage: "912.500 mV",
    chassis: { manufacturer: "Palebluedot Simulated", product: "HGX A100 8-GPU" },
    buses: [0x07, 0x0f, 0x47, 0x4e, 0x87, 0x90, 0xb7, 0xbd],
  },
  l40s: {
    ...h100,
    ...ampere,
    name: "NVIDIA L40S",
    architecture: "Ada Lovelace",
    pciDeviceId: "26B910DE",
    pciSubSystemId: "185110DE",
    memoryTotalMib: 46068,
    memoryReservedMib: 609,
    bar1TotalMib: 65536,
    computeCapability: "8.9",
    powerIdleWatts: 36,
    powerLimitWatts: 350,
    powerMinimumWatts: 100,
    temperatureIdle: 30,
    temperatureLoad: 66,
    hasMemoryTemperature: false,
    temperatureLimits: { kind: "tlimit", base: 88, shutdown: -5, slowdown: -2 },
    memoryMaximumTemperature: undefined,
    maximumOperatingTemperature: 88,
    clockIdle: 210,
    clockMaximum: 2520,
    memoryClock: 9001,
    videoClockIdle: 1185,
    videoClockMaximum: 1965,
    idlePerformanceState: "P8",
    vbios: "95.02.66.00.15",
    boardPartNumber: "900-2G133-A880-000",
    gpuPartNumber: "26B9-896-A1",
    inforomImage: "G133.0242.00.03",
    hasInforomFlush: false,
    mig: false,
    remapBanks: 192,
    nvlinks: 0,
    graphicsVoltage: "N/A",
    chassis: { manufacturer: "Palebluedot Simulated", product: "PCIe L40S 4-GPU" },
    buses: pcieBuses,
  },
  t4: {
    ...h100,
    ...ampere,
    name: "Tesla T4",
    architecture: "Turing",
    pciDeviceId: "1EB810DE",
    pciSubSystemId: "12A210DE",
    memoryTotalMib: 15360,
    memoryReservedMib: 388,
    bar1TotalMib: 256,
    computeCapability: "7.5",
    powerIdleWatts: 10,
    powerLimitWatts: 70,
    powerMinimumWatts: 60,
    temperatureIdle: 36,
    temperatureLoad: 74,
    hasMemoryTemperature: false,
    temperatureLimits: { kind: "absolute", shutdown: 96, slowdown: 93 },
    memoryMaximumTemperature: undefined,
    maximumOperatingTemperature: 85,
    clockIdle: 300,
    clockMaximum: 1590,
    memoryClock: 5001,
    videoClockIdle: 540,
    videoClockMaximum: 1470,
    idlePerformanceState: "P8",
    vbios: "90.04.84.00.06",
    boardPartNumber: "900-2G183-0000-001",
    gpuPartNumber: "1EB8-895-A1",
    inforomImage: "G183.0200.00.02",
    inforomOem: "1.1",
    inforomEcc: "5.0",
    hasInforomFlush: false,
    pcieGeneration: 3,
    mig: false,
    remapBanks: undefined,
    nvlinks: 0,
    addressingMode: "None",
    graphicsVoltage: "N/A",
    chassis: { manufacturer: "Palebluedot Simulated", product: "PCIe T4" },
    buses: pcieBuses,
  },
};

/** One driver generation: its version texts and which DTD its XML names. */
export interface DriverGeneration {
  readonly major: number;
  readonly version: string;
  readonly cudaVersion: string;
  readonly dtd: string;
}

export const driverGenerations: readonly DriverGeneration[] = [
  { major: 535, version: "535.183.01", cudaVersion: "12.2", dtd: "nvsmi_device_v12.dtd" },
  { major: 570, version: "570.148.08", cudaVersion: "12.8", dtd: "nvsmi_device_v12.dtd" },
  { major: 580, version: "580.105.08", cudaVersion: "13.0", dtd: "nvsmi_device_v13.dtd" },
  { major: 590, version: "590.48.01", cudaVersion: "13.1", dtd: "nvsmi_device_v13.dtd" },
  { major: 595, version: "595.80", cudaVersion: "13.2", dtd: "nvsmi_device_v13.dtd" },
];
