"""Builds tar shards, and the files that describe them, from the entries of a source."""
