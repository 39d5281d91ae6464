-- breaking: no
-- A live claim is on a GPU of the server that it names. Released ones are history: their GPU may have moved since.

alter table gpus add constraint gpus_of_server unique (id, server_id);
-- Null for a released claim, which the key below then does not look at.
alter table claims add column live_server_id uuid
  generated always as (case when released_at is null then server_id end) stored;
-- Its own: the other indexes on gpu_id hold live claims only, and a GPU that moves or goes is looked up in all.
create index claims_gpu on claims (gpu_id, live_server_id);
alter table claims add constraint claims_gpu_of_server
  foreign key (gpu_id, live_server_id) references gpus (id, server_id);
