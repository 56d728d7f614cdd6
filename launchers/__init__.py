"""The commands on a SLURM cluster: `d2s.launchers`. README.md in this folder says which file does what."""
