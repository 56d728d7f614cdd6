"""From shards to batches, by step."""
