-- breaking: no
-- Where the agent's session comes from, as the listener saw it: an agent says much of itself, this is not its word.

alter table servers add column session_address text;
