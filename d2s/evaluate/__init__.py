"""Embeds a split and measures it: recall, ranks, capacity."""
