"""Writes and reads the models of a run: checkpoints to resume from, and model folders to use."""
