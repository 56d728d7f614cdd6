"""Evaluates a model on a split: embeds it, then measures recall, ranks and information capacity."""
