"""Contains helpers that need no torch: for command lines, files, folders, progress and processes."""
