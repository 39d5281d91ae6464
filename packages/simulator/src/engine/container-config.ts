/** The part of the body of `POST /containers/create` the simulated engine reads; the rest is kept and given back. */
import { z } from "zod";

const strings = z.array(z.string());
const command = z.union([strings, z.string().transform((text) => [text])]).nullish();
const stringMap = z.record(z.string(), z.string()).nullish();
const portBindings = z
  .record(
    z.string().regex(/^\d+\/(tcp|udp|sctp)$/),
    z.array(z.looseObject({ HostIp: z.string().optional(), HostPort: z.string().optional() })).nullable(),
  )
  .nullish();

export const createBodySchema = z.looseObject({
  Image: z.string().min(1),
  Cmd: command,
  Entrypoint: command,
  Env: strings.nullish(),
  Labels: stringMap,
  Tty: z.boolean().nullish(),
  Hostname: z.string().nullish(),
  StopSignal: z.string().nullish(),
  StopTimeout: z.number().nullish(),
  HostConfig: z
    .looseObject({
      Binds: strings.nullish(),
      Mounts: z
        .array(
          z.looseObject({
            Type: z.string(),
            Source: z.string().optional(),
            Target: z.string(),
            ReadOnly: z.boolean().optional(),
          }),
        )
        .nullish(),
      Devices: z
        .array(z.looseObject({ PathOnHost: z.string(), PathInContainer: z.string().optional() }))
        .nullish(),
      DeviceRequests: z
        .array(
          z.looseObject({
            Driver: z.string().optional(),
            Count: z.number().int().optional(),
            DeviceIDs: strings.nullish(),
            Capabilities: z.array(strings).nullish(),
          }),
        )
        .nullish(),
      RestartPolicy: z
        .looseObject({
          Name: z.enum(["", "no", "always", "unless-stopped", "on-failure"]).optional(),
          MaximumRetryCount: z.number().int().min(0).optional(),
        })
        .nullish(),
      NetworkMode: z.string().nullish(),
      PortBindings: portBindings,
      AutoRemove: z.boolean().nullish(),
      Memory: z.number().nullish(),
    })
    .nullish(),
});
export type CreateBody = z.infer<typeof createBodySchema>;

const stateSchema = z.object({
  status: z.enum(["created", "running", "restarting", "exited"]),
  pid: z.number(),
  startTicks: z.number(),
  exitCode: z.number(),
  error: z.string(),
  oomKilled: z.boolean(),
  startedAt: z.string(),
  finishedAt: z.string(),
  restartCount: z.number(),
  /** Stopped or killed by request: no restart policy but "always" after an engine restart applies. */
  stopRequested: z.boolean(),
});
export type ContainerState = z.infer<typeof stateSchema>;

/** What the engine keeps of one container on disk. */
export const containerRecordSchema = z.object({
  id: z.string(),
  name: z.string(),
  createdAt: z.string(),
  imageId: z.string(),
  imageName: z.string(),
  command: strings,
  env: strings,
  gpus: z.array(z.number()),
  ports: z.record(z.string(), z.array(z.object({ HostIp: z.string(), HostPort: z.string() }))),
  mounts: z.array(
    z.object({
      Type: z.string(),
      Name: z.string().optional(),
      Source: z.string(),
      Destination: z.string(),
      RW: z.boolean(),
    }),
  ),
  body: createBodySchema,
  state: stateSchema,
});
export type ContainerRecord = z.infer<typeof containerRecordSchema>;

export const neverTime = "0001-01-01T00:00:00Z";

export const initialState: ContainerState = {
  status: "created",
  pid: 0,
  startTicks: 0,
  exitCode: 0,
  error: "",
  oomKilled: false,
  startedAt: neverTime,
  finishedAt: neverTime,
  restartCount: 0,
  stopRequested: false,
};
