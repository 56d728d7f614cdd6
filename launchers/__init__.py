"""The training commands on a SLURM cluster. Nothing stands here yet: see README, "What is missing"."""
