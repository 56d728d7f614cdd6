"""From the entries of a source to tar shards and the files that describe them."""
