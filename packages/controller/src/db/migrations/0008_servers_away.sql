-- breaking: no
-- Looked for every few seconds, and almost never there: servers that are away and not yet known to be.

create index servers_away on servers (disconnected_at)
  where session_replica is null and not conditions ? 'unreachable' and state not in ('pending', 'retired');
