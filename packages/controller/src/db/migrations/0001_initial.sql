-- breaking: no
-- The first schema. Invariants that must hold whatever the code does are constraints here; the property
-- test in test/invariants attacks them one by one.

create extension if not exists btree_gist;

-- Names this database's history. After a restore an operator gives it a new incarnation
-- (palebluedot-controller new-incarnation), so that agents do not mistake lower generations for stale documents.
create table installation (
  singleton boolean primary key default true check (singleton),
  incarnation uuid not null,
  created_at timestamptz not null default now()
);

-- ---- identity ---------------------------------------------------------------------------------

create table tenants (
  id uuid primary key,
  name text not null unique check (name ~ '^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$'),
  created_at timestamptz not null default now(),
  disabled_at timestamptz
);

create table api_tokens (
  id uuid primary key,
  -- null: not bound to a tenant (admin, operator)
  tenant_id uuid references tenants,
  name text not null,
  role text not null check (role in ('admin', 'operator', 'member')),
  token_sha256 bytea not null unique,
  created_at timestamptz not null default now(),
  created_by uuid,
  expires_at timestamptz,
  revoked_at timestamptz,
  check ((role = 'member') = (tenant_id is not null))
);

-- ---- servers and GPUs -------------------------------------------------------------------------

create table servers (
  id uuid primary key,
  name text not null unique,
  state text not null check (state in ('pending', 'verifying', 'available', 'deploying', 'in_use', 'cleaning', 'maintenance', 'failed', 'retired')),
  state_since timestamptz not null default now(),
  state_message text not null default '',
  pool text not null default 'container' check (pool in ('container', 'bare_metal')),
  -- Normalised identity; null when the firmware holds a placeholder. Matching, not authentication.
  serial text,
  smbios_uuid text,
  bmc_mac text,
  bmc_address text,
  labels jsonb not null default '{}' check (jsonb_typeof(labels) = 'object'),
  site text,
  rack text,
  rack_unit integer,
  -- { "<name>": { "status", "reason", "message", "since" } }; e.g. unreachable, draining, gpu-driver
  conditions jsonb not null default '{}' check (jsonb_typeof(conditions) = 'object'),
  inventory jsonb,
  agent_version text,
  agent_capabilities text[] not null default '{}',
  boot_id text,
  session_epoch bigint not null default 0,
  session_replica text,
  connected_at timestamptz,
  disconnected_at timestamptz,
  draining boolean not null default false,
  desired_generation bigint not null default 0,
  observed_generation bigint not null default 0,
  created_at timestamptz not null default now(),
  updated_at timestamptz not null default now()
);
create index servers_serial on servers (serial) where serial is not null;
create index servers_smbios_uuid on servers (smbios_uuid) where smbios_uuid is not null;
create index servers_bmc_mac on servers (bmc_mac) where bmc_mac is not null;
create index servers_state on servers (state, id);

create table server_macs (
  mac text not null,
  server_id uuid not null references servers on delete cascade,
  primary key (mac, server_id)
);
create index server_macs_server on server_macs (server_id);

create table gpus (
  id uuid primary key,
  server_id uuid not null references servers,
  -- NVIDIA's UUID ("GPU-..."). A GPU is one row for life; it may move to another server.
  uuid text not null unique,
  index integer not null,
  model text not null,
  serial text,
  pci_bus_id text not null,
  -- null when the device did not tell
  memory_bytes bigint,
  inventory jsonb not null,
  labels jsonb not null default '{}' check (jsonb_typeof(labels) = 'object'),
  -- Operator's word: may new allocations land here?
  schedulable boolean not null default true,
  schedulable_reason text not null default '',
  -- False when the server no longer reports it.
  present boolean not null default true,
  health text not null default 'unknown' check (health in ('healthy', 'degraded', 'unhealthy', 'unknown')),
  health_reason text not null default '',
  mig_enabled boolean,
  created_at timestamptz not null default now(),
  updated_at timestamptz not null default now()
);
create index gpus_server on gpus (server_id, index);
create index gpus_model on gpus (model, id);

-- ---- enrolment --------------------------------------------------------------------------------

create table certificate_authorities (
  id uuid primary key,
  certificate_der bytea not null,
  -- AES-256-GCM under the installation's secret key
  private_key_encrypted bytea not null,
  created_at timestamptz not null default now(),
  retired_at timestamptz
);

create table join_tokens (
  id uuid primary key,
  name text not null,
  token_sha256 bytea not null unique,
  auto_approve boolean not null default false,
  -- null: good for any server
  server_id uuid references servers,
  max_uses integer not null check (max_uses between 1 and 100000),
  uses integer not null default 0,
  pool text not null default 'container' check (pool in ('container', 'bare_metal')),
  labels jsonb not null default '{}',
  created_at timestamptz not null default now(),
  created_by uuid,
  expires_at timestamptz not null,
  revoked_at timestamptz,
  check (uses <= max_uses)
);

create table enrolment_requests (
  public_key_sha256 bytea primary key,
  server_id uuid not null references servers,
  join_token_id uuid not null references join_tokens,
  identity jsonb not null,
  state text not null check (state in ('pending', 'approved', 'rejected')),
  reason text not null default '',
  created_at timestamptz not null default now(),
  decided_at timestamptz,
  decided_by uuid
);
create index enrolment_requests_server on enrolment_requests (server_id);

create table certificates (
  -- lower-case hex of the X.509 serial number
  serial text primary key,
  server_id uuid not null references servers,
  public_key_sha256 bytea not null,
  not_before timestamptz not null,
  not_after timestamptz not null,
  issued_at timestamptz not null default now(),
  revoked_at timestamptz,
  revoked_reason text
);
create index certificates_server on certificates (server_id);
create index certificates_key on certificates (public_key_sha256);

-- One row per agent journal: everything up to last_sequence is in the outbox already.
create table agent_event_cursors (
  server_id uuid not null references servers on delete cascade,
  journal_id text not null,
  last_sequence bigint not null,
  updated_at timestamptz not null default now(),
  primary key (server_id, journal_id)
);

-- ---- allocations and claims -------------------------------------------------------------------

create table allocations (
  id uuid primary key,
  tenant_id uuid not null references tenants,
  name text not null default '',
  state text not null check (state in ('queued', 'scheduled', 'provisioning', 'active', 'releasing', 'ended')),
  state_since timestamptz not null default now(),
  end_reason text check (end_reason in ('released', 'expired', 'preempted', 'failed', 'cancelled')),
  -- For people: why it waits, why it failed.
  message text not null default '',
  -- What was asked for, without secret values.
  request jsonb not null,
  -- Secret values of the request (environment, registry password), AES-256-GCM; null when there are none
  -- and wiped when the allocation ends.
  secrets_encrypted bytea,
  priority integer not null default 0,
  lease_seconds integer not null check (lease_seconds > 0),
  -- Counted from active.
  expires_at timestamptz,
  server_id uuid references servers,
  -- What the agent last reported: phase, container_id, exit_code, ports, holders, ...
  observed jsonb not null default '{}',
  created_at timestamptz not null default now(),
  created_by uuid,
  scheduled_at timestamptz,
  active_at timestamptz,
  releasing_at timestamptz,
  ended_at timestamptz,
  check ((state = 'ended') = (ended_at is not null)),
  check (state not in ('releasing', 'ended') or end_reason is not null),
  check (state in ('queued', 'ended') or server_id is not null)
);
create index allocations_tenant on allocations (tenant_id, id);
create index allocations_queue on allocations (priority desc, created_at, id) where state = 'queued';
create index allocations_live_server on allocations (server_id) where state in ('scheduled', 'provisioning', 'active', 'releasing');

create table claims (
  id uuid primary key,
  allocation_id uuid not null references allocations,
  server_id uuid not null references servers,
  -- null: a claim on the server itself
  gpu_id uuid references gpus,
  mode text not null check (mode in ('whole', 'mig', 'share')),
  -- Range of the GPU's memory slots, and lane of time shares.
  slots int4range not null default '[0,)' check (not isempty(slots)),
  lane int4range not null default '[0,)' check (not isempty(lane)),
  media_extension boolean not null default false,
  -- Exclusive use of the whole server, also of GPUs that are found later. 1 or 0, so that gist can compare.
  server_exclusive smallint not null default 0 check (server_exclusive in (0, 1)),
  claimed_at timestamptz not null default now(),
  -- When the tenant stopped paying.
  usage_ended_at timestamptz,
  -- Only after the clean-up behind the tenant was verified.
  released_at timestamptz,
  check (released_at is null or usage_ended_at is not null),
  check (gpu_id is not null or server_exclusive = 1),
  check (mode <> 'whole' or (slots = '[0,)' and lane = '[0,)')),
  check (mode <> 'mig' or (lane = '[0,)' and not upper_inf(slots) and lower(slots) >= 0)),
  check (mode <> 'share' or (slots = '[0,)' and upper(lane) - lower(lane) = 1 and lower(lane) >= 0)),
  constraint claims_no_overlap exclude using gist (gpu_id with =, slots with &&, lane with &&) where (released_at is null),
  constraint claims_one_mode exclude using gist (gpu_id with =, mode with <>) where (released_at is null),
  constraint claims_server_exclusivity exclude using gist (server_id with =, server_exclusive with <>) where (released_at is null),
  constraint claims_server_owner exclude using gist (server_id with =, allocation_id with <>) where (released_at is null and server_exclusive = 1)
);
create unique index claims_one_media_extension on claims (gpu_id) where released_at is null and media_extension;
create index claims_allocation on claims (allocation_id);
create index claims_live_server on claims (server_id) where released_at is null;

create table idempotency_keys (
  tenant_id uuid not null references tenants,
  key text not null,
  request_sha256 bytea not null,
  allocation_id uuid not null references allocations,
  created_at timestamptz not null default now(),
  primary key (tenant_id, key)
);
create index idempotency_keys_age on idempotency_keys (created_at);

-- ---- durable work -----------------------------------------------------------------------------

-- What is due when. One row per thing under reconciliation; a worker holds it by lease and token.
create table reconcile_queue (
  kind text not null,
  key uuid not null,
  due_at timestamptz not null,
  attempt integer not null default 0,
  lease_token bigint not null default 0,
  leased_until timestamptz,
  last_error text,
  primary key (kind, key)
);
create index reconcile_queue_due on reconcile_queue (due_at);

create table leader_leases (
  name text primary key,
  holder text not null,
  token bigint not null,
  expires_at timestamptz not null
);

-- ---- events -----------------------------------------------------------------------------------

-- Written in the transaction that makes the change. Commit order is unknown here.
create table outbox (
  id uuid primary key,
  type text not null,
  severity text not null default 'info' check (severity in ('info', 'warning', 'error')),
  tenant_id uuid,
  server_id uuid,
  gpu_id uuid,
  allocation_id uuid,
  actor text not null default 'system',
  message text not null default '',
  data jsonb not null default '{}',
  occurred_at timestamptz not null default now()
);

-- The stream: one relay (the leader) moves rows here and gives each its place. Readers resume on seq.
create table events (
  seq bigint primary key,
  id uuid not null unique,
  type text not null,
  severity text not null,
  tenant_id uuid,
  server_id uuid,
  gpu_id uuid,
  allocation_id uuid,
  actor text not null,
  message text not null,
  data jsonb not null,
  occurred_at timestamptz not null,
  recorded_at timestamptz not null default now()
);
create index events_tenant on events (tenant_id, seq) where tenant_id is not null;
create index events_server on events (server_id, seq) where server_id is not null;
create index events_allocation on events (allocation_id, seq) where allocation_id is not null;
create index events_age on events (recorded_at);

-- How far each sink has got ("sequence" holds the last seq given out).
create table event_cursors (
  name text primary key,
  seq bigint not null
);
insert into event_cursors (name, seq) values ('sequence', 0);
