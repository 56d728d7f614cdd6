"""Builds an HTML page about a run. The page needs no other files."""
