"""Computes the order of samples and the random draws, with pure functions."""
