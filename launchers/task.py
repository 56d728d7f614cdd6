"""Runs one rank of a job on a cluster: `srun python -m d2s.launchers.task train | evaluate | shard ARGUMENT...`.

Sets the variables that torch and DeepSpeed read, from SLURM's variables. Runs the command in this process, so that
signals reach it directly. If the job was preempted, requests that the job be requeued, except after TERM. SLURM sends
TERM before a preemption, and then requeues the job itself. SLURM also sends TERM on scancel, and then the job must
not restart. In a job array, `{seed}` in any argument is replaced by the array index.
"""

import os
import signal
import sys
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import NoReturn

from d2s.common.messages import one_line
from d2s.workers.preemption import PREEMPTED, Preemption, leave_group

COMMANDS = {
    "train": "d2s.train",
    "evaluate": "d2s.evaluate.command",
    "shard": "d2s.shard",
    "check": "d2s.launchers.check",
}
SEED = "{seed}"
_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
_SLURM = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")
_LOCAL = ("SUBMITIT_LOCAL_GLOBALID", "SUBMITIT_LOCAL_NTASKS", "SUBMITIT_LOCAL_LOCALID")


@dataclass(frozen=True)
class ExitStatus:
    """The exit code of a command. requeue: whether the job must be requeued."""

    code: int
    requeue: bool = False

    @property
    def same_on_all_ranks(self) -> bool:
        """Whether all ranks end with this code. Only then can this rank wait for all other ranks to end."""
        return self.code in (0, PREEMPTED)


def rank_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Returns the variables RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE of this task.

    environment: has the variables of srun (see srun(1), "OUTPUT ENVIRONMENT VARIABLES") or of submitit's local
        executor. For the local executor, also returns MASTER_ADDR and MASTER_PORT. The job number sets the port.

    Raises ValueError on SLURM if a variable is missing that srun or launchers/job.sh sets.
    """
    if environment.get("SUBMITIT_EXECUTOR") == "local":
        found = {ours: environment[theirs] for ours, theirs in zip(_NAMES, _LOCAL, strict=True)}
        port = 20000 + int(environment["SUBMITIT_LOCAL_JOB_ID"]) % 20000
        return {**found, "LOCAL_WORLD_SIZE": found["WORLD_SIZE"],
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # fmt: skip
    missing = [name for name in (*_SLURM, "MASTER_ADDR", "MASTER_PORT") if name not in environment]
    if missing:
        raise ValueError(
            f"{missing[0]} is not set: start this with srun, in a script that sources launchers/job.sh"
        )
    found = {ours: environment[theirs] for ours, theirs in zip(_NAMES, _SLURM, strict=True)}
    per_node = tasks_per_node(environment.get("SLURM_TASKS_PER_NODE", found["WORLD_SIZE"]))
    return {**found, "LOCAL_WORLD_SIZE": str(per_node[int(environment.get("SLURM_NODEID", "0"))])}


def tasks_per_node(text: str) -> list[int]:
    """Returns the number of tasks on each node. text: SLURM's short form, as in "2(x3),1" for [2, 2, 2, 1]."""
    counts: list[int] = []
    for part in text.split(","):
        count, _, times = part.partition("(x")
        counts += [int(count)] * int(times.rstrip(")") or 1)
    return counts


def fill_in_seed(arguments: list[str], environment: Mapping[str, str]) -> list[str]:
    """Returns the arguments with `{seed}` replaced by the index in the job array.

    Raises ValueError if `{seed}` is used outside an array, and if trainings of an array would share a run folder.
    """
    # The job array of a sweep does not count. Each of its jobs already has different arguments and a run folder.
    index = None if "SUBMITIT_EXECUTOR" in environment else environment.get("SLURM_ARRAY_TASK_ID")
    used = [argument for argument in arguments if SEED in argument]
    if index is None:
        if used:
            raise ValueError(f"{used[0]}: {SEED} stands for the index in a job array; use sbatch --array=0-4")
        return arguments
    run_folders = [value for name, value in pairwise(arguments) if name == "--run"]
    run_folders += [argument for argument in arguments if argument.startswith("--run=")]
    if arguments[:1] == ["train"] and not any(SEED in folder for folder in run_folders):
        raise ValueError(f"--run: the jobs of an array would write into one run; name it with {SEED} in it")
    return [argument.replace(SEED, index) for argument in arguments]


def resume_after_requeue(arguments: list[str], environment: Mapping[str, str]) -> list[str]:
    """Returns the arguments. Adds --resume if the command is a training that SLURM has restarted."""
    requeued = int(environment.get("SLURM_RESTART_COUNT", "0")) > 0
    if arguments[:1] == ["train"] and requeued and "--resume" not in arguments:
        return [*arguments, "--resume"]
    return arguments


def run_command(arguments: list[str], environment: MutableMapping[str, str] = os.environ) -> ExitStatus:
    """Runs one of COMMANDS as this rank. For a user's mistake, prints one line to stderr and returns code 2."""
    preemption = Preemption()
    if arguments[:1] == ["train"]:
        preemption.install()  # before the slow imports, because a signal may come at any time
    try:
        if not arguments or arguments[0] not in COMMANDS:
            raise ValueError(f"no command {' '.join(arguments[:1])!r}; there are {', '.join(COMMANDS)}")
        environment.update(rank_variables(environment))
        arguments = resume_after_requeue(fill_in_seed(arguments, environment), environment)
    except ValueError as error:
        print(f"error: {one_line(str(error))}", file=sys.stderr)
        return ExitStatus(2)
    command = import_module(COMMANDS[arguments[0]]).main
    if arguments[0] != "train":
        return ExitStatus(command(arguments[1:]) or 0)
    code = command(arguments[1:], preemption)
    # Reads the signal again, because the job may have been cancelled while its ranks wrote the checkpoint.
    return ExitStatus(code, requeue=code == PREEMPTED and preemption.agreed() != signal.SIGTERM)


def request_requeue(environment: Mapping[str, str] = os.environ) -> None:
    """Requests that this job be restarted. To do so, rank 0 creates the file that the variable D2S_REQUEUE names.

    On SLURM, launchers/job.sh finds the file and requeues the job, because a rank's container may lack scontrol. For
    a local job, the submitting command finds the file. Call this before any rank ends. srun then kills all ranks.
    """
    if environment["RANK"] != "0":
        return
    try:
        Path(environment["D2S_REQUEUE"]).touch()
    except (KeyError, OSError) as error:
        what = "D2S_REQUEUE is not set" if isinstance(error, KeyError) else str(error)
        print(f"error: no requeue: {what}; submit the job again, with --resume", file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> NoReturn:
    """Runs the command of this task, requests a requeue if the job was preempted, and exits."""
    status = run_command(sys.argv[1:] if argv is None else argv)
    if status.requeue:
        request_requeue()
    leave_group(status.code, ordered=status.same_on_all_ranks)
    sys.exit(status.code)


if __name__ == "__main__":
    main()
