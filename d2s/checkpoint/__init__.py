"""What a run leaves on the disk: checkpoints that are complete or invisible, and model folders."""
