/** What happened, before it has its place in the stream. Appended in the transaction that made it happen. */
export interface NewEvent {
  /** UUIDv7; also the `Nats-Msg-Id`. Made when absent. */
  readonly id?: string;
  /** Dotted: "allocation.active", "server.enrolled", "gpu.xid", ... */
  readonly type: string;
  readonly severity?: "info" | "warning" | "error";
  readonly tenantId?: string | null;
  readonly serverId?: string | null;
  readonly gpuId?: string | null;
  readonly allocationId?: string | null;
  /** "system", "agent:<server id>", "token:<token id>" */
  readonly actor?: string;
  readonly message?: string;
  readonly data?: Readonly<Record<string, unknown>>;
  readonly occurredAt?: Date;
}
