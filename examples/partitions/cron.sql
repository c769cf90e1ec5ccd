-- In the database of pg_cron (the setting cron.database_name): looks every hour whether there is something to do.
CREATE EXTENSION IF NOT EXISTS pg_cron;
SELECT cron.schedule_in_database('attolytics partitions', '17 * * * *', 'CALL partman.run_maintenance_proc()', 'attolytics');
