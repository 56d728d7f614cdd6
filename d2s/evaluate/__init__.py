"""Evaluates a model on a split: embeddings, recall and ranks, information capacity."""
