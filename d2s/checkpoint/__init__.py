"""Writes and reads the checkpoints of a run, and writes its model folders."""
