-- breaking: no
-- The end of a container's output outlives the container: the tenant's own, like the output itself.

alter table allocations add column output_tail bytea check (octet_length(output_tail) <= 16384);

-- For the housekeeping that forgets it.
create index allocations_output_tail_age on allocations (ended_at) where output_tail is not null;
