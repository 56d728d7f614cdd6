"""Kills a training at random moments and compares it with one that was left alone."""
