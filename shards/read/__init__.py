"""Reads samples: by number through the index, or as a stream of tars."""
