/** What a new container gets of the host: ports and mounts. */
import { randomBytes } from "node:crypto";
import { existsSync } from "node:fs";
import type { ContainerRecord, CreateBody } from "./container-config.ts";
import { EngineError } from "./http.ts";

/** Host ports for a container, those of running containers being taken. Throws 500 when a wanted one is taken. */
export function choosePorts(body: CreateBody, running: readonly ContainerRecord[]): ContainerRecord["ports"] {
  const used = new Set(
    running.flatMap((record) =>
      Object.values(record.ports)
        .flat()
        .map((binding) => binding.HostPort),
    ),
  );
  let next = 32_768;
  return Object.fromEntries(
    Object.entries(body.HostConfig?.PortBindings ?? {}).map(([port, bindings]) => [
      port,
      (bindings ?? []).map((binding) => {
        let hostPort = binding.HostPort ?? "";
        if (hostPort === "" || hostPort === "0") {
          while (used.has(String(next))) next++;
          hostPort = String(next);
        } else if (used.has(hostPort)) {
          throw new EngineError(
            500,
            `driver failed programming external connectivity: Bind for ${binding.HostIp ?? "0.0.0.0"}:${hostPort} failed: port is already allocated`,
          );
        }
        used.add(hostPort);
        return {
          HostIp: binding.HostIp === undefined || binding.HostIp === "" ? "0.0.0.0" : binding.HostIp,
          HostPort: hostPort,
        };
      }),
    ]),
  );
}

/** Mounts of a container; named volumes are made. Throws 400 when a bind source does not exist. */
export function chooseMounts(
  body: CreateBody,
  ensureVolume: (name: string) => string,
): ContainerRecord["mounts"] {
  const asked = [
    ...(body.HostConfig?.Mounts ?? []).map((mount) => ({
      type: mount.Type,
      source: mount.Source ?? "",
      target: mount.Target,
      writable: mount.ReadOnly !== true,
    })),
    ...(body.HostConfig?.Binds ?? []).map((bind) => {
      const [source = "", target = "", mode = ""] = bind.split(":");
      return {
        type: source.startsWith("/") ? "bind" : "volume",
        source,
        target,
        writable: !mode.split(",").includes("ro"),
      };
    }),
  ];
  return asked
    .filter((mount) => mount.type !== "tmpfs")
    .map((mount) => {
      if (mount.type === "volume") {
        const name = mount.source === "" ? randomBytes(32).toString("hex") : mount.source;
        return {
          Type: "volume",
          Name: name,
          Source: ensureVolume(name),
          Destination: mount.target,
          RW: mount.writable,
        };
      }
      if (!existsSync(mount.source)) {
        throw new EngineError(
          400,
          `invalid mount config for type "bind": bind source path does not exist: ${mount.source}`,
        );
      }
      return { Type: "bind", Source: mount.source, Destination: mount.target, RW: mount.writable };
    });
}
