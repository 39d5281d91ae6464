import type { Clock } from "@palebluedot/shared/clock.ts";
import type { Logger } from "@palebluedot/shared/logger.ts";
import type { GpuMonitor } from "../gpu/types.ts";

/** How GPUs get into a container. */
const gpuModes = ["cdi", "nvidia-runtime", "device-nodes"] as const;
export type GpuMode = (typeof gpuModes)[number];

export interface EngineOptions {
  /** As in DOCKER_HOST: unix:///path, tcp://host:port (TLS with DOCKER_CERT_PATH). Default: /var/run/docker.sock. */
  readonly dockerHost?: string;
  /** Directory with ca.pem, cert.pem and key.pem for a tcp:// engine. */
  readonly certPath?: string;
  /** Overrides detection. */
  readonly gpuMode?: GpuMode;
  /** Where nvidia0, nvidiactl, ... are on this host. Default /dev. */
  readonly deviceDir?: string;
  /** The containers' network: "bridge" (default), "none" or the name of a network made by the operator. Never "host". */
  readonly network?: string;
  /** Registries ("host" or "host:port") on the host itself or its link that tenants may pull from all the same. */
  readonly allowedRegistries?: readonly string[];
  /** Address published ports are bound to. Default 0.0.0.0. */
  readonly publishAddress?: string;
}

/** Time allowances; every one has a default, tests shorten them. */
export interface ReconcilerTimings {
  /** Deadline of one short engine call. Default 15 s. */
  readonly engineCallMs?: number;
  /** Ping of the engine, and the pause between tries when it is away (full jitter up to this). Default 10 s. */
  readonly enginePingMs?: number;
  /** Every workload is looked at anew at least this often. Default 30 s. */
  readonly resyncMs?: number;
  /** A pull without a byte of progress ends after this. Default 5 min. */
  readonly pullStallMs?: number;
  /** A pull ends after this in any case. Default 60 min. */
  readonly pullTotalMs?: number;
  /** Base of the back-off between pulls, starts and restarts; capped at 60 times it. Default 1 s. */
  readonly retryBaseMs?: number;
  /** How long GPUs may take to become idle after the container is gone before DIRTY is reported. Default 30 s. */
  readonly verifyMs?: number;
  /** Pause between looks at a GPU that is not idle yet. Default 1 s; ten times that once DIRTY. */
  readonly verifyPollMs?: number;
}

export interface ReconcilerOptions {
  /** Holds the desired document, workload records, the secret key and the volumes. Made with mode 0700. */
  readonly dataDir: string;
  readonly engineOptions: EngineOptions;
  readonly gpuMonitor: Pick<GpuMonitor, "holders" | "snapshot">;
  readonly clock: Clock;
  readonly log: Logger;
  readonly random?: () => number;
  readonly timings?: ReconcilerTimings;
  /**
   * Containers of another owner on the same engine are never touched. Default: a random id kept in
   * dataDir. Several agents on one engine (a demo, a test) keep apart by it.
   */
  readonly ownerId?: string;
}
