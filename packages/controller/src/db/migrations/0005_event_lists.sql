-- breaking: no
-- Lists of events by GPU, type and severity must not read the whole stream to find a few.

create index events_gpu on events (gpu_id, seq) where gpu_id is not null;
create index events_type on events (type text_pattern_ops, seq);
create index events_severity on events (severity, seq) where severity <> 'info';
