"""Commands that run D2S on a SLURM cluster. README.md in this folder describes each file."""
