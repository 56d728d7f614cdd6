"""The worker processes of a run: the group, exchanges of tensors, the watchdog, signals."""
