import { createServer, connect, type AddressInfo, type Socket } from "node:net";

/** A wire between two processes that can be cut: bytes stop in both directions, connections stay half-dead. */
export interface TcpProxy extends AsyncDisposable {
  readonly port: number;
  /** Black hole: nothing passes and new connections are not answered, as when a switch dies. */
  cut(): void;
  /** Lets new connections through; those that were cut are gone, as after a time-out. */
  restore(): void;
}

export async function startTcpProxy(
  target: () => { readonly host: string; readonly port: number },
): Promise<TcpProxy> {
  const open = new Set<Socket>();
  let isCut = false;
  const server = createServer((client) => {
    open.add(client);
    client.on("error", () => client.destroy());
    client.on("close", () => open.delete(client));
    if (isCut) {
      client.pause();
      return;
    }
    const upstream = connect(target());
    open.add(upstream);
    upstream.on("error", () => client.destroy());
    upstream.on("close", () => {
      open.delete(upstream);
      client.destroy();
    });
    client.on("close", () => upstream.destroy());
    client.on("data", (chunk) => {
      if (isCut) return;
      if (!upstream.write(chunk)) {
        client.pause();
        upstream.once("drain", () => client.resume());
      }
    });
    upstream.on("data", (chunk) => {
      if (isCut) return;
      if (!client.write(chunk)) {
        upstream.pause();
        client.once("drain", () => upstream.resume());
      }
    });
  });
  await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
  return {
    port: (server.address() as AddressInfo).port,
    cut() {
      isCut = true;
    },
    restore() {
      isCut = false;
      for (const socket of open) socket.destroy();
    },
    async [Symbol.asyncDispose]() {
      for (const socket of open) socket.destroy();
      await new Promise((resolve) => server.close(resolve));
    },
  };
}
