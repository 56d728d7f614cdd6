"""Builds batches from shards."""
