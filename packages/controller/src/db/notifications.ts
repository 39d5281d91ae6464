/**
 * PostgreSQL LISTEN/NOTIFY as a hint between replicas. A hint may be lost (reconnect), so every listener
 * also polls, or rereads after `onReconnect`.
 */
export type NotificationChannel =
  | "desired_state"
  | "fleet"
  | "queue"
  | "outbox"
  | "events"
  | "certificates"
  | "identity";

export interface Notifications {
  /** Payload: comma-separated ids, at most 7 kB, or "*" for all. */
  notify(channel: NotificationChannel, payload: string): Promise<void>;
  /** Returns the function that ends the subscription. */
  listen(
    channel: NotificationChannel,
    onPayload: (payload: string) => void,
    onReconnect?: () => void,
  ): () => void;
  close(): Promise<void>;
}
