"""Starts, connects, watches and stops the worker processes of a run."""
