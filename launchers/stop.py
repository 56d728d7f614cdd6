"""The signal that asks a job to stop, and how long before its time limit it is sent.

submitit's executors read this file. sbatch reads the `#SBATCH --signal` lines of the *.slurm scripts literally, so
tests/launchers/test_stop.py compares those with it, and job.sh's exit code with `d2s.workers.preemption.PREEMPTED`.
"""

SIGNAL = "USR2"
"""One of `d2s.workers.preemption.SIGNALS`. Not USR1, which NCCL may catch."""
LEAD_SECONDS = 120
"""Seconds between the signal and the limit, enough for a step and a checkpoint. SLURM may add up to 60."""
