"""How a step becomes jobs: what each of them gets, submitit's executor for it, and what it runs in every task."""

import atexit
import contextlib
import io
import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import submitit

from d2s.launchers import task
from d2s.launchers.states import LOGS
from d2s.workers.group import leave

# submitit's local controller starts the tasks again after this exit code, six starts in all.
LOCAL_REQUEUE = 144
Cluster = Literal["slurm", "local"]
# sbatch reads these, and they would win over what each step asks for.
ASKED_BY_STEPS = (
    "SBATCH_GRES", "SBATCH_GPUS", "SBATCH_GPUS_PER_NODE", "SBATCH_GPUS_PER_TASK", "SBATCH_TIMELIMIT",
    "SBATCH_SIGNAL",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What each training job gets. Other jobs take one node and one task, and GPUs only where they use them."""

    cluster: Cluster = "slurm"
    nodes: int = 1
    tasks: int = 1
    """Tasks a node: one for each GPU."""
    gpus: bool = True
    cpus: int = 1
    """Cores a task."""
    minutes: int = 24 * 60
    signal_seconds: int = 120
    """How long before the end of its time a job is told to write a checkpoint."""


@dataclass
class Step:
    """One job, or one array of jobs: `commands` holds the arguments of `d2s.launchers.task` of each."""

    name: str
    commands: list[list[str]]
    after: list[str] = field(default_factory=list)
    """Names of the steps that must have succeeded."""
    wide: bool = False
    """Takes all nodes, tasks and GPUs; else one task without a GPU (`gpu` for one)."""
    gpu: bool = False
    ids: list[str] = field(default_factory=list)
    state: str = ""
    """Last known state, where no scheduler remembers it."""


class Command:
    """What submitit pickles and runs in every task of a job. submitit's own checkpoint only saves this again."""

    def __init__(self, arguments: list[str]) -> None:
        self.arguments = arguments

    def __call__(self) -> int:
        local = os.environ.get("SUBMITIT_EXECUTOR") == "local"
        if local and os.environ["SUBMITIT_LOCAL_GLOBALID"] == "0":
            task.request().unlink(missing_ok=True)  # of the start before this one
        outcome = task.run(self.arguments)
        if outcome.requeue:
            task.ask_requeue()
            sys.stdout.flush()
            sys.stderr.flush()
            # Without a result: the job has not come to its end.
            leave(LOCAL_REQUEUE if local else outcome.code, ordered=True)
        if "torch" in sys.modules:
            # After submitit has written the result: the way out that gloo's threads cannot turn into an abort.
            atexit.register(leave, outcome.code, ordered=outcome.together)
        if outcome.code:
            raise RuntimeError(f"{self.arguments[0]} ended with code {outcome.code}: see the lines above")
        return 0

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """For a signal before the command took over: there is nothing to save yet, start again."""
        return submitit.helpers.DelayedSubmission(self)


def site_settings() -> dict[str, str]:
    """The variables that launchers/site.env sets, if there is one."""
    if not Path("launchers/site.env").is_file():
        return {}
    script = "set -a; source launchers/site.env; env -0"
    names = subprocess.run(
        ["env", "-i", "bash", "--norc", "-c", script], capture_output=True, text=True, check=True
    )
    pairs = (line.partition("=")[::2] for line in names.stdout.split("\0") if line)
    return {name: value for name, value in pairs if name.startswith(("SBATCH_", "D2S_"))}


def use_site() -> None:
    """Has sbatch, as this process calls it, read the site's account and the like, and what the steps ask for."""
    os.environ.update({name: text for name, text in site_settings().items() if name.startswith("SBATCH_")})
    for name in ASKED_BY_STEPS:
        os.environ.pop(name, None)


def executor(folder: Path, step: Step, resources: Resources, after: list[str]) -> submitit.Executor:
    """submitit's executor for one step; `after` holds the job numbers that must succeed first."""
    tasks, nodes = (resources.tasks, resources.nodes) if step.wide else (1, 1)
    gpus = tasks if resources.gpus and (step.wide or step.gpu) else 0
    if resources.cluster == "local":
        local = submitit.LocalExecutor(folder / LOGS, max_num_timeout=10_000)
        local.update_parameters(
            timeout_min=resources.minutes, tasks_per_node=tasks, signal_delay_s=resources.signal_seconds,
            **local_gpus(gpus),
        )  # fmt: skip
        return local
    # The shell's words of job.sh: a container's options, the site's own, and the environment's python.
    python = '"${container[@]}" "${extra[@]}" "${python[@]}"'
    slurm = submitit.SlurmExecutor(folder / LOGS, max_num_timeout=10_000, python=python)
    more: dict[str, Any] = {"requeue": True, "kill-on-invalid-dep": "yes"}
    if gpus:
        more["gres"] = f"{site_settings().get('D2S_GPU') or os.environ.get('D2S_GPU') or 'gpu'}:{gpus}"
    slurm.update_parameters(
        job_name=f"d2s-{step.name}",
        time=resources.minutes,
        nodes=nodes,
        ntasks_per_node=tasks,
        cpus_per_task=resources.cpus,
        signal_delay_s=resources.signal_seconds,
        # The last line is the command itself, whose failure must not end the script.
        setup=["[ -f launchers/job.sh ] || exit 2", "source launchers/job.sh", "set +e"],
        teardown=['ended "$?"'],
        srun_args=["--kill-on-bad-exit=1", f"--cpus-per-task={resources.cpus}"],
        dependency=f"afterok:{':'.join(after)}" if after else None,
        additional_parameters=more,
    )
    return slurm


def local_gpus(count: int) -> dict[str, Any]:
    """submitit's parameters for `count` GPUs of this machine: of those that CUDA_VISIBLE_DEVICES names, if set.

    submitit sets the variable for its jobs, to nothing unless told otherwise.
    """
    outer = os.environ.get("CUDA_VISIBLE_DEVICES")
    if outer is None or not count:
        return {"gpus_per_node": count}
    names = [name.strip() for name in outer.split(",") if name.strip()]
    try:
        numbers = [int(name) for name in names]
    except ValueError:
        raise ValueError(
            f"CUDA_VISIBLE_DEVICES is {outer!r}: --cluster local takes numbers, as in CUDA_VISIBLE_DEVICES=0,1"
        ) from None
    # An empty list would mean all of them to submitit.
    return {"gpus_per_node": min(count, len(numbers)), "visible_gpus": numbers[:count]}


def hand_over(folder: Path, step: Step, resources: Resources, after: list[str]) -> list[str]:
    """Submits a step to SLURM; its jobs' numbers. Raises ValueError where sbatch refuses it."""
    chosen = executor(folder, step, resources, after)
    said = io.StringIO()
    try:
        # submitit prints what sbatch says, too.
        with contextlib.redirect_stderr(said), chosen.batch():
            jobs = [chosen.submit(Command(arguments)) for arguments in step.commands]
    except (submitit.core.utils.FailedJobError, submitit.core.utils.FailedSubmissionError) as error:
        lines = [line for line in str(error).splitlines() if line.strip()] or ["it said nothing"]
        raise ValueError(f"sbatch refused {step.name}: {lines[-1].strip()}") from error
    return [job.job_id for job in jobs]


def dump(folder: Path, step: Step, resources: Resources) -> str:
    """The script that a step would submit, and the commands that its jobs would run."""
    lines = [f"# {step.name}"]
    if resources.cluster == "slurm":
        chosen = executor(folder, step, resources, [])
        if step.after:
            chosen.update_parameters(dependency="afterok:" + ":".join(f"<{name}>" for name in step.after))
        if len(step.commands) > 1:
            chosen.parameters["map_count"] = len(step.commands)
        lines.append(chosen._make_submission_file_text(chosen._submitit_command_str, "dry-run"))
    return "\n".join(lines + [f"# runs: {json.dumps(command)}" for command in step.commands]) + "\n"
