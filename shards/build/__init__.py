"""From a source to tar shards and a manifest."""
