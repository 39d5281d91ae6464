import { storedRequestSchema, type StoredRequest } from "@palebluedot/shared/allocation-request.ts";
import {
  ContainerSpec_PullPolicy,
  ContainerSpec_RestartPolicy,
  WorkloadDesired_Target,
  type ContainerSpec,
  type DesiredState,
  type EnvironmentVariable,
  type WorkloadDesired,
} from "@palebluedot/shared/generated/palebluedot/agent/v1/agent.ts";
import type { Logger } from "@palebluedot/shared/logger.ts";
import type { SecretBox } from "@palebluedot/shared/secret-box.ts";
import type { AllocationState } from "@palebluedot/shared/vocabulary.ts";
import type { Sql } from "postgres";
import { z } from "zod";

/** The secret part of a request, as it is sealed in allocations.secrets_encrypted. */
export const allocationSecretsSchema = z.object({
  environment: z.record(z.string(), z.string()),
  registry_password: z.string().optional(),
});
export type AllocationSecrets = z.infer<typeof allocationSecretsSchema>;

/** Authenticated with the ciphertext: secrets of one allocation do not decrypt in another's row. */
export const secretContext = (allocationId: string): string => `allocation:${allocationId}`;

const restartPolicies = {
  never: ContainerSpec_RestartPolicy.NEVER,
  on_failure: ContainerSpec_RestartPolicy.ON_FAILURE,
  always: ContainerSpec_RestartPolicy.ALWAYS,
} as const;

const pullPolicies = {
  if_not_present: ContainerSpec_PullPolicy.IF_NOT_PRESENT,
  always: ContainerSpec_PullPolicy.ALWAYS,
  never: ContainerSpec_PullPolicy.NEVER,
} as const;

/** The container of a request in the agent link's words. 0 and "" mean "not asked for". */
export function containerSpec(
  container: StoredRequest["container"],
  secrets: AllocationSecrets,
): ContainerSpec {
  const environment: EnvironmentVariable[] = [
    ...Object.entries(container.environment).map(([name, value]) => ({ name, value, secret: false })),
    ...Object.entries(secrets.environment).map(([name, value]) => ({ name, value, secret: true })),
  ];
  return {
    image: container.image,
    command: container.command,
    args: container.args,
    environment,
    workingDirectory: container.working_directory ?? "",
    user: container.user ?? "",
    cpuMillicores: container.cpu_millicores ?? 0,
    memoryBytes: container.memory_bytes ?? 0,
    pids: container.pids ?? 0,
    shmBytes: container.shm_bytes ?? 0,
    ulimits: container.ulimits,
    ports: container.ports.map((port) => ({
      containerPort: port.container_port,
      hostPort: port.host_port,
      protocol: port.protocol,
    })),
    volumes: container.volumes.map((volume) => ({
      name: volume.name,
      mountPath: volume.mount_path,
      readOnly: volume.read_only,
      hostPath: volume.host_path ?? "",
    })),
    addedCapabilities: container.added_capabilities,
    restartPolicy: restartPolicies[container.restart_policy],
    maxRestarts: container.max_restarts,
    stopGraceSeconds: container.stop_grace_seconds,
    registry:
      container.registry === undefined
        ? undefined
        : { ...container.registry, password: secrets.registry_password ?? "" },
    pullPolicy: pullPolicies[container.pull_policy],
    privileged: container.privileged,
    hostNetwork: container.host_network,
    hostPid: container.host_pid,
    hostIpc: container.host_ipc,
    hostDevices: container.host_devices,
  };
}

interface DesiredRow {
  id: string;
  incarnation: string;
  desired_generation: number;
  draining: boolean;
  workloads:
    | {
        id: string;
        tenant_id: string;
        state: AllocationState;
        request: unknown;
        secrets: string | null;
        gpu_uuids: string[] | null;
      }[]
    | null;
}

/**
 * The documents of these servers in one statement, so that each is of one moment. Unknown ids are left out,
 * and so is a server whose document cannot be made (logged): an incomplete document would stop containers.
 */
export async function loadDesiredStates(
  deps: { readonly sql: Sql; readonly secrets: SecretBox; readonly log: Logger },
  serverIds: readonly string[],
): Promise<Map<string, DesiredState>> {
  if (serverIds.length === 0) return new Map();
  const rows = await deps.sql<DesiredRow[]>`
    select server.id, server.desired_generation, server.draining,
      (select incarnation from installation) as incarnation,
      (
        select jsonb_agg(jsonb_build_object(
          'id', allocation.id, 'tenant_id', allocation.tenant_id, 'state', allocation.state,
          'request', allocation.request, 'secrets', encode(allocation.secrets_encrypted, 'base64'),
          'gpu_uuids', (
            select jsonb_agg(gpu.uuid order by gpu.index) from claims claim join gpus gpu on gpu.id = claim.gpu_id
            where claim.allocation_id = allocation.id and claim.released_at is null)
        ) order by allocation.id)
        from allocations allocation
        where allocation.server_id = server.id
          and allocation.state in ('scheduled', 'provisioning', 'active', 'releasing')
      ) as workloads
    from servers server where server.id = any(${serverIds as string[]}::uuid[])`;
  const documents = new Map<string, DesiredState>();
  for (const row of rows) {
    try {
      documents.set(row.id, documentOf(row, deps.secrets));
    } catch (error) {
      deps.log.error({ server_id: row.id, err: error }, "the desired state of a server cannot be made");
    }
  }
  return documents;
}

function documentOf(row: DesiredRow, secretBox: SecretBox): DesiredState {
  const workloads = (row.workloads ?? []).map((workload): WorkloadDesired => {
    const request = storedRequestSchema.parse(workload.request);
    const reclaimed = workload.state === "releasing";
    return {
      allocationId: workload.id,
      tenantId: workload.tenant_id,
      target: reclaimed ? WorkloadDesired_Target.RECLAIMED : WorkloadDesired_Target.RUNNING,
      gpuUuids: workload.gpu_uuids ?? [],
      // What is to be stopped needs no secrets any more.
      container: containerSpec(
        request.container,
        reclaimed ? { environment: {} } : openSecrets(secretBox, workload.id, workload.secrets),
      ),
    };
  });
  return {
    incarnation: row.incarnation,
    generation: row.desired_generation,
    drain: row.draining,
    workloads,
  };
}

function openSecrets(secretBox: SecretBox, allocationId: string, sealed: string | null): AllocationSecrets {
  if (sealed === null) return { environment: {} };
  const opened = secretBox.open(Buffer.from(sealed, "base64"), secretContext(allocationId));
  return allocationSecretsSchema.parse(JSON.parse(opened.toString("utf8")));
}
