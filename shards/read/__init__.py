"""Indexed and streamed reading."""
