"""What a run writes to continue and to use: checkpoints and model folders."""
