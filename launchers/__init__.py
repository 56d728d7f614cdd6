"""The commands on a SLURM cluster: `d2s.launchers`.

*.slurm          sbatch scripts; their first lines are what a site changes
job.sh           what they share: environment, rendezvous, one task a GPU
site.env         a site's own settings, made from site.env.example
task.py          one rank of a job: adopts SLURM's variables, runs the command, requeues after a preemption
submit.py        pipelines and sweeps through submitit, on SLURM or on this machine
check.py         the pre-flight of an allocation
"""
