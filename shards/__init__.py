"""Data at rest: captions and images become tar shards with a manifest, checked, indexed and read back.

Nothing here imports torch: a machine that only builds shards needs no GPU stack.
"""
