-- On the coordinator, when the tables are there. attolytics_ledger stays as it is.
SELECT create_distributed_table('events', 'user_id');
SELECT create_distributed_table('purchases', 'id');
