/** What a role may do, as permission strings. Routes name one of these; nothing compares roles. */
export const permissions = [
  "allocations:read",
  "allocations:write",
  // of every tenant, not only one's own
  "allocations:all",
  // to go before others in the queue
  "allocations:priority",
  "capacity:read",
  "events:read",
  "events:all",
  "servers:read",
  "servers:write",
  "gpus:read",
  "gpus:write",
  "join-tokens:read",
  "join-tokens:write",
  "metrics:read",
  "tenants:read",
  "tenants:write",
  "tokens:read",
  "tokens:write",
  "self:read",
] as const;

export type Permission = (typeof permissions)[number];

export const roles = ["admin", "operator", "metrics", "member"] as const;
export type Role = (typeof roles)[number];

const member: readonly Permission[] = [
  "allocations:read",
  "allocations:write",
  "capacity:read",
  "events:read",
  "self:read",
];

const operator: readonly Permission[] = [
  ...member,
  "allocations:all",
  "allocations:priority",
  "events:all",
  "servers:read",
  "servers:write",
  "gpus:read",
  "gpus:write",
  "join-tokens:read",
  "join-tokens:write",
  "metrics:read",
  "tenants:read",
];

/** What Prometheus needs and nothing more: its token lies in a file on another host. */
const metrics: readonly Permission[] = ["metrics:read", "self:read"];

export const permissionsOfRole: Readonly<Record<Role, ReadonlySet<Permission>>> = {
  member: new Set(member),
  operator: new Set(operator),
  metrics: new Set(metrics),
  admin: new Set(permissions),
};

/** Who makes a request. */
export interface Principal {
  readonly tokenId: string;
  readonly tokenName: string;
  readonly role: Role;
  /** Null for every role but member: they belong to no tenant. */
  readonly tenantId: string | null;
  readonly tenantName: string | null;
  readonly permissions: ReadonlySet<Permission>;
  /** As events name it: "token:<id>". */
  readonly actor: string;
}
