"""Estimates the parameters, memory, network traffic and time of a training."""
