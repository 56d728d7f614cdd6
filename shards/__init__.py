"""Data sets on disk: builds tar shards with a manifest from captions and images, checks, indexes and reads them.

Nothing here imports torch, so a machine that only builds shards needs no GPU software.
"""
