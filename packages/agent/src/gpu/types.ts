import type {
  Condition,
  GpuHolder,
  GpuInventory,
  GpuSample,
} from "@palebluedot/shared/generated/palebluedot/agent/v1/agent.ts";

/** Something the kernel log or nvidia-smi told about one GPU; goes into the durable journal. */
export interface GpuEvent {
  /** "gpu.xid", "gpu.lost", "gpu.recovery-action", ... */
  readonly type: string;
  readonly gpuUuid: string;
  readonly message: string;
  readonly timeUnixMs: number;
  readonly data: Readonly<Record<string, unknown>>;
}

export interface GpuSnapshot {
  readonly gpus: readonly GpuInventory[];
  /** "gpu-driver", "nvidia-smi", "gpu-<index>" ... */
  readonly conditions: readonly Condition[];
  readonly takenAtUnixMs: number;
}

/** Watches the GPUs of this host. Never blocks on nvidia-smi: a hung one becomes a condition. */
export interface GpuMonitor {
  /** Resolves after the first look (or its time-out): the snapshot then says what is known. */
  start(): Promise<void>;
  stop(): Promise<void>;
  snapshot(): GpuSnapshot;
  /** Last sample per GPU, with the age the caller can judge from time_unix_ms. */
  latestSamples(): readonly GpuSample[];
  /** Each returns the unsubscribe function. */
  onSamples(listener: (samples: readonly GpuSample[]) => void): () => void;
  onSnapshot(listener: (snapshot: GpuSnapshot) => void): () => void;
  onEvent(listener: (event: GpuEvent) => void): () => void;
  /** Runs the slow loop now; concurrent calls share one run. */
  refresh(): Promise<GpuSnapshot>;
  /** Ends the long-lived child so that the GPUs are idle; the returned function starts it again. Nests. */
  pause(reason: string): Promise<() => void>;
  /**
   * What sits on these GPUs right now: compute and graphics processes, and memory above the idle level
   * (as a holder with pid 0). `unknown` with the reason when nvidia-smi does not answer: unknown is not clean.
   */
  holders(
    gpuUuids: readonly string[],
  ): Promise<
    | { readonly kind: "known"; readonly holders: readonly GpuHolder[] }
    | { readonly kind: "unknown"; readonly reason: string }
  >;
}
