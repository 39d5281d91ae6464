-- breaking: no
-- Why a host was let in, as data: only an operator's word, for this host, may replace another key's certificate.

alter table enrolment_requests
  -- null: waits, was rejected, or was decided before this was recorded (then it replaces nothing)
  add column approval text check (approval in ('auto-approve', 'recorded-server', 'bound-token', 'operator')),
  -- The request made its server's record: a placeholder, until a certificate is issued for it.
  add column made_server boolean not null default false;

update enrolment_requests set approval = 'operator' where state = 'approved' and decided_by is not null;
