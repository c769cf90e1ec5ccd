-- The table, before the server is started for the first time: what the schema file says, and PARTITION BY.
CREATE TABLE events (
    received_at timestamp with time zone NOT NULL,
    time timestamp with time zone,
    event_type varchar,
    network varchar,
    extra jsonb
) PARTITION BY RANGE (received_at);
CREATE INDEX ON events (received_at);
ALTER TABLE events OWNER TO attolytics;

-- A partition for this month, the 3 before it and the 3 after it.
CREATE SCHEMA partman;
CREATE EXTENSION pg_partman SCHEMA partman;
SELECT partman.create_parent('public.events', 'received_at', 'native', 'monthly', p_premake := 3);
-- Also while no events come; months that are older than 13 are dropped, and not only detached.
UPDATE partman.part_config
    SET infinite_time_partitions = true, retention = '13 months', retention_keep_table = false
    WHERE parent_table = 'public.events';
