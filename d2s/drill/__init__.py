"""Kills a training at random moments, restarts it, and compares its result with an uninterrupted training's."""
