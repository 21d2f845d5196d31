"""What a shard goes through: prepare, Worker, commit."""
