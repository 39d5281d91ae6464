import { mkdirSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { startPart, type RunningProcess } from "./process.ts";

export interface AgentOptions {
  readonly dataDir: string;
  /** host:port of the enrolment listener. */
  readonly controller: string;
  readonly caFingerprint: string;
  readonly joinToken: string;
  /** Paths of nvidia-smi, identity, kernel log, container engine: see createSimulatedServer. */
  readonly env: Readonly<Record<string, string>>;
  /** Command in front, e.g. ["faketime", "+10m"]. */
  readonly wrap?: readonly string[];
  /** In place of the source under this Node: a built agent, with the Node and the flags to run it. */
  readonly program?: readonly string[];
}

export interface AgentProcess extends RunningProcess {
  readonly dataDir: string;
  /** Starts it again on the same data, after kill() or stop(). */
  restart(env?: Readonly<Record<string, string>>): AgentProcess;
}

/** Starts a real agent. It enrols by itself; ask the controller when it has arrived. */
export function startAgent(options: AgentOptions): AgentProcess {
  mkdirSync(options.dataDir, { recursive: true, mode: 0o700 });
  const joinTokenFile = join(options.dataDir, "join-token");
  writeFileSync(joinTokenFile, `${options.joinToken}\n`, { mode: 0o600 });
  const running = startPart("agent", ["run"], {
    logFile: join(options.dataDir, "agent.log"),
    ...(options.wrap === undefined ? {} : { wrap: options.wrap }),
    ...(options.program === undefined ? {} : { program: options.program }),
    env: {
      PALEBLUEDOT_CONTROLLER: options.controller,
      PALEBLUEDOT_CA_FINGERPRINT: options.caFingerprint,
      PALEBLUEDOT_JOIN_TOKEN_FILE: joinTokenFile,
      PALEBLUEDOT_DATA_DIR: options.dataDir,
      PALEBLUEDOT_METRICS_HOST: "127.0.0.1",
      PALEBLUEDOT_METRICS_PORT: "0",
      ...options.env,
    },
  });
  return {
    ...running,
    dataDir: options.dataDir,
    restart: (env) => startAgent({ ...options, env: { ...options.env, ...env } }),
  };
}
