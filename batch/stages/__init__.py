"""The stages of a shard: prepare, worker, commit."""
