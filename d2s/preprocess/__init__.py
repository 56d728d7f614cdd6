"""Turns image files into pixel arrays, and captions into token ids."""
