"""The signal that asks a job to stop, and the time from the signal to the job's time limit.

`executors.py` uses these constants. The *.slurm scripts cannot import them and repeat them in `#SBATCH --signal`
lines. Likewise job.sh repeats `d2s.workers.preemption.PREEMPTED`. tests/launchers/test_stop.py compares the values.
"""

SIGNAL = "USR2"
"""One of `d2s.workers.preemption.SIGNALS`. Not USR1, which NCCL may catch."""
LEAD_SECONDS = 120
"""Seconds from the signal to the time limit. Enough for a training step and a checkpoint. SLURM may add 60 s."""
