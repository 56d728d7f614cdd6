"""One rank of a cluster's job: `srun python -m d2s.launchers.task train | evaluate | shard ARGUMENT...`.

SLURM names ranks in its own words; this gives them the names that torch and DeepSpeed read, runs the command in
this very process, so that nothing stands between a signal and a rank, and asks for a job that was preempted to be
put back into the queue. Not after TERM: the scheduler sends it before a preemption of its own, which requeues by
itself, and on scancel, which must not. In a job array `{seed}` in any argument becomes the array's index.
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

from d2s.workers.preemption import PREEMPTED, Preemption

COMMANDS = {
    "train": "d2s.train",
    "evaluate": "d2s.evaluate",
    "shard": "d2s.shard",
    "check": "d2s.launchers.check",
}
SEED = "{seed}"
# What srun, and submitit's local cluster, call a rank.
_SLURM = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_NTASKS", "LOCAL_RANK": "SLURM_LOCALID"}
_LOCAL = {
    "RANK": "SUBMITIT_LOCAL_GLOBALID",
    "WORLD_SIZE": "SUBMITIT_LOCAL_NTASKS",
    "LOCAL_RANK": "SUBMITIT_LOCAL_LOCALID",
}


def rank_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """RANK and its like, from SLURM's variables of a task (srun(1), "OUTPUT ENVIRONMENT VARIABLES").

    The tasks of submitit's local cluster meet at a port of their job's. Raises ValueError where neither started
    this process, or MASTER_ADDR and MASTER_PORT are missing.
    """
    if environment.get("SUBMITIT_EXECUTOR") == "local":
        found = {name: environment[theirs] for name, theirs in _LOCAL.items()}
        port = 20000 + int(environment["SUBMITIT_LOCAL_JOB_ID"]) % 20000
        return {**found, "LOCAL_WORLD_SIZE": found["WORLD_SIZE"], "NODE_RANK": "0",
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # fmt: skip
    missing = [name for name in (*_SLURM.values(), "MASTER_ADDR", "MASTER_PORT") if name not in environment]
    if missing:
        raise ValueError(
            f"{missing[0]} is not set: start this with srun, in a script that sources launchers/job.sh"
        )
    found = {name: environment[theirs] for name, theirs in _SLURM.items()}
    # "2(x3),1": two tasks on three nodes, then one.
    per_node = environment.get("SLURM_TASKS_PER_NODE", found["WORLD_SIZE"])
    node = int(environment.get("SLURM_NODEID", "0"))
    return {**found, "LOCAL_WORLD_SIZE": str(tasks_per_node(per_node)[node]), "NODE_RANK": str(node)}


def tasks_per_node(text: str) -> list[int]:
    """SLURM's short form "2(x3),1" as [2, 2, 2, 1]."""
    counts: list[int] = []
    for part in text.split(","):
        count, _, times = part.partition("(x")
        counts += [int(count)] * int(times.rstrip(")") or 1)
    return counts


def with_seed(arguments: list[str], environment: Mapping[str, str]) -> list[str]:
    """`{seed}` in the arguments as the index in the job array. Raises ValueError where that cannot be."""
    # A sweep's array, submitit's, names each run by itself.
    index = None if "SUBMITIT_EXECUTOR" in environment else environment.get("SLURM_ARRAY_TASK_ID")
    used = [argument for argument in arguments if SEED in argument]
    if index is None:
        if used:
            raise ValueError(f"{used[0]}: {SEED} stands for the index in a job array; use sbatch --array=0-4")
        return arguments
    if arguments[:1] == ["train"] and not any(SEED in run for run in _values(arguments, "--run")):
        raise ValueError(f"--run: the jobs of an array would write into one run; name it with {SEED} in it")
    return [argument.replace(SEED, index) for argument in arguments]


def _values(arguments: list[str], option: str) -> list[str]:
    """What stands after an option, as `--run X` or `--run=X`."""
    after = [b for a, b in pairwise(arguments) if a == option]
    return after + [a.partition("=")[2] for a in arguments if a.startswith(f"{option}=")]


def resumed(arguments: list[str], environment: Mapping[str, str]) -> list[str]:
    """The arguments of a job's later starts: training goes on from its newest checkpoint."""
    again = int(environment.get("SLURM_RESTART_COUNT", "0")) > 0
    if arguments[:1] == ["train"] and again and "--resume" not in arguments:
        return [*arguments, "--resume"]
    return arguments


@dataclass(frozen=True)
class Outcome:
    """How a command ended: its exit code, and whether its job should be put back into the queue."""

    code: int
    requeue: bool = False

    @property
    def run_on_all(self) -> bool:
        """Whether all ranks ended alike."""
        return self.code in (0, PREEMPTED)


def run(arguments: list[str], environment: MutableMapping[str, str] = os.environ) -> Outcome:
    """Runs one of COMMANDS as this rank. Code 2 stands for a mistake, said in one line."""
    preemption = Preemption()
    if arguments[:1] == ["train"]:
        preemption.install()  # before the heavy imports: a signal may come at any time
    try:
        if not arguments or arguments[0] not in COMMANDS:
            raise ValueError(f"no command {' '.join(arguments[:1])!r}; there are {', '.join(COMMANDS)}")
        environment.update(rank_variables(environment))
        arguments = resumed(with_seed(arguments, environment), environment)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return Outcome(2)
    command = import_module(COMMANDS[arguments[0]]).main
    if arguments[0] != "train":
        return Outcome(command(arguments[1:]) or 0)
    code = command(arguments[1:], preemption)
    # Asked once more: a job that is cancelled while its ranks write their checkpoint is not to come back.
    return Outcome(code, requeue=code == PREEMPTED and preemption.agreed() != signal.SIGTERM)


def request(environment: Mapping[str, str] = os.environ) -> Path:
    """The file that asks for this job to be started again.

    launchers/job.sh looks for it once the ranks have left: a container, which a rank may be in, need not hold
    scontrol. On submitit's local cluster the command that runs the jobs does.
    """
    if environment.get("SUBMITIT_EXECUTOR") == "local":
        return local_request(Path(environment["SUBMITIT_FOLDER"]), environment["SUBMITIT_LOCAL_JOB_ID"])
    return Path(environment["D2S_REQUEUE"])


def local_request(folder: Path, job: str) -> Path:
    """The same for a job of submitit's local cluster that keeps its files in `folder`."""
    return folder / f"{job}_requeue"


def ask_requeue(environment: Mapping[str, str] = os.environ) -> None:
    """Rank 0 asks for this job to be started again. Before any rank leaves: srun then ends the others."""
    if environment["RANK"] != "0":
        return
    try:
        request(environment).touch()
    except (KeyError, OSError) as error:
        what = "D2S_REQUEUE is not set" if isinstance(error, KeyError) else str(error)
        print(f"error: no requeue: {what}; submit the job again, with --resume", file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> NoReturn:
    """The command of a task: runs it, asks for a requeue if it was preempted, and leaves as the others do."""
    outcome = run(sys.argv[1:] if argv is None else argv)
    if outcome.requeue:
        ask_requeue()
    if "torch" in sys.modules:
        from d2s.workers.group import leave

        leave(outcome.code, ordered=outcome.together)
    sys.exit(outcome.code)


if __name__ == "__main__":
    main()
