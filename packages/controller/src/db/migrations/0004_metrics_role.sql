-- breaking: no
-- A role for Prometheus. Earlier releases refuse its tokens by their prefix.

alter table api_tokens drop constraint api_tokens_role_check;
alter table api_tokens add constraint api_tokens_role_check check (role in ('admin', 'operator', 'metrics', 'member'));
