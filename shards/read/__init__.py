"""Reads samples: by row number with the index, or as a stream of tars."""
