"""Turns a step of a pipeline or sweep into SLURM jobs or local jobs, through submitit."""

import atexit
import contextlib
import io
import json
import os
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import submitit
from submitit.local.local import LOCAL_REQUEUE_RETURN_CODE

from d2s.launchers import task
from d2s.launchers.states import LOGS, requeue_file
from d2s.launchers.stop import LEAD_SECONDS, SIGNAL
from d2s.workers.preemption import leave_group

# Ends of the names of SBATCH_ variables to unset. They would override options that each script sets itself.
SET_BY_STEPS = ("GRES", "GPUS", "GPUS_PER_NODE", "GPUS_PER_TASK", "TIMELIMIT", "SIGNAL")
# Too many to be reached. `checkpoint.max_stalled_restarts` stops a training that restarts without progress.
MAX_RESTARTS = 10_000


@dataclass(frozen=True, kw_only=True)
class Resources:
    """The resources of a training job. Other jobs get one node and one task, and a GPU only if `Step.gpu`."""

    cluster: Literal["slurm", "local"] = "slurm"
    nodes: int = 1
    tasks: int = 1
    """Number of tasks per node. Each task uses one GPU."""
    gpus: bool = True
    cpus: int = 1
    """Number of cores per task."""
    minutes: int = 24 * 60
    """Time limit of a job in minutes."""
    signal_seconds: int = LEAD_SECONDS
    """Seconds between the signal to write a checkpoint and the time limit."""


@dataclass
class Step:
    """A step of a pipeline or sweep. It has a job for each entry of `commands`. Several jobs form a job array."""

    name: str
    commands: list[list[str]]
    after: list[str] = field(default_factory=list)
    """Names of the steps that must succeed before this step starts."""
    wide: bool = False
    """Whether each job gets all nodes, tasks and GPUs of `Resources`. If not, a job gets one task."""
    gpu: bool = False
    """Whether a job that is not `wide` gets a GPU."""
    ids: list[str] = field(default_factory=list)
    """Numbers of the submitted jobs."""
    state: str = ""
    """Last known state of a local step. On SLURM "COMPLETED" if `resume` must not run the step again, else ""."""


class Command:
    """Runs a command of `d2s.launchers.task`. submitit pickles this callable and calls it in every task of a job."""

    def __init__(self, arguments: list[str]) -> None:
        self.arguments = arguments

    def __call__(self) -> int:
        """Runs the command. Raises RuntimeError if the command fails. submitit then marks the job as failed."""
        local = os.environ.get("SUBMITIT_EXECUTOR") == "local"
        if local:
            file = requeue_file(Path(os.environ["SUBMITIT_FOLDER"]), os.environ["SUBMITIT_LOCAL_JOB_ID"])
            os.environ["D2S_REQUEUE"] = str(file)
            if os.environ["SUBMITIT_LOCAL_GLOBALID"] == "0":
                file.unlink(missing_ok=True)  # the previous start of the job may have left the file
        status = task.run_command(self.arguments)
        if status.requeue:
            task.request_requeue()
            # Ends the process before submitit writes a result, because the job is not finished.
            leave_group(LOCAL_REQUEUE_RETURN_CODE if local else status.code, ordered=True)
        # Ends the process with this code at exit, so that submitit can write the result first.
        atexit.register(leave_group, status.code, ordered=status.same_on_all_ranks)
        if status.code:
            raise RuntimeError(f"{self.arguments[0]} ended with code {status.code}: see the lines above")
        return 0

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """Makes submitit submit this callable again. submitit calls it if a signal comes before the command runs."""
        return submitit.helpers.DelayedSubmission(self)


def site_settings() -> dict[str, str]:
    """Returns the SBATCH_ and D2S_ variables that launchers/site.env sets. Returns {} if there is no such file."""
    if not Path("launchers/site.env").is_file():
        return {}
    script = "set -a; source launchers/site.env; env -0"
    command = ["env", "-i", "bash", "--norc", "-c", script]
    variables = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    pairs = (line.partition("=")[::2] for line in variables.split("\0") if line)
    return {name: value for name, value in pairs if name.startswith(("SBATCH_", "D2S_"))}


def apply_site_settings() -> None:
    """Sets the SBATCH_ variables of launchers/site.env in this process. Unsets the variables in SET_BY_STEPS."""
    os.environ.update({name: text for name, text in site_settings().items() if name.startswith("SBATCH_")})
    for name in SET_BY_STEPS:
        os.environ.pop(f"SBATCH_{name}", None)


def executor(folder: Path, step: Step, resources: Resources, after: list[str]) -> submitit.Executor:
    """Returns submitit's executor for a step. after: numbers of the jobs that must succeed before the step."""
    nodes, tasks = (resources.nodes, resources.tasks) if step.wide else (1, 1)
    gpus = tasks if resources.gpus and (step.wide or step.gpu) else 0
    os.environ["SUBMITIT_PREEMPT_SIGNAL"] = SIGNAL  # read by submitit's processes in the job
    if resources.cluster == "local":
        local = submitit.LocalExecutor(folder / LOGS, max_num_timeout=MAX_RESTARTS)
        local.update_parameters(
            timeout_min=resources.minutes, tasks_per_node=tasks, signal_delay_s=resources.signal_seconds,
            **local_gpus(gpus),
        )  # fmt: skip
        return local
    # job.sh sets these bash arrays: the container's options, the site's srun options and the Python command.
    python = '"${container[@]}" "${extra[@]}" "${python[@]}"'
    slurm = submitit.SlurmExecutor(folder / LOGS, max_num_timeout=MAX_RESTARTS, python=python)
    signal = f"{SIGNAL}@{resources.signal_seconds}"
    options: dict[str, Any] = {"requeue": True, "kill-on-invalid-dep": "yes", "signal": signal}
    if gpus:
        options["gres"] = f"{site_settings().get('D2S_GPU') or os.environ.get('D2S_GPU') or 'gpu'}:{gpus}"
    slurm.update_parameters(
        job_name=f"d2s-{step.name}",
        time=resources.minutes,
        nodes=nodes,
        ntasks_per_node=tasks,
        cpus_per_task=resources.cpus,
        # Without set +e the script would end before `ended` if the command fails.
        setup=["[ -f launchers/job.sh ] || exit 2", "source launchers/job.sh", "set +e"],
        teardown=['ended "$?"'],
        srun_args=["--kill-on-bad-exit=1", f"--cpus-per-task={resources.cpus}"],
        dependency=f"afterok:{':'.join(after)}" if after else None,
        additional_parameters=options,
    )
    return slurm


def local_gpus(count: int) -> dict[str, Any]:
    """Returns submitit's parameters for a local job with `count` GPUs.

    submitit overwrites CUDA_VISIBLE_DEVICES in its jobs. So if the variable is set, the parameters name the first
    `count` GPUs in it. Raises ValueError if the variable has entries that are not numbers.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None or not count:
        return {"gpus_per_node": count}
    numbers = [name.strip() for name in visible.split(",") if name.strip()]
    if not all(map(str.isdecimal, numbers)):
        raise ValueError(
            f"CUDA_VISIBLE_DEVICES is {visible!r}: --cluster local takes numbers, as in CUDA_VISIBLE_DEVICES=0,1"
        )
    # submitit takes an empty list for all GPUs. So the count must be 0 if no GPU is visible.
    return {"gpus_per_node": min(count, len(numbers)), "visible_gpus": list(map(int, numbers[:count]))}


def submit_step(folder: Path, step: Step, resources: Resources, after: list[str]) -> list[str]:
    """Submits a step to start after the jobs `after`. Returns its job numbers. Raises ValueError if sbatch fails."""
    chosen = executor(folder, step, resources, after)
    try:
        # Hides stderr, because submitit both prints and raises the error of sbatch.
        with contextlib.redirect_stderr(io.StringIO()), chosen.batch():
            jobs = [chosen.submit(Command(arguments)) for arguments in step.commands]
    except (submitit.core.utils.FailedJobError, submitit.core.utils.FailedSubmissionError) as error:
        lines = [line for line in str(error).splitlines() if line.strip()] or ["it gave no reason"]
        raise ValueError(f"sbatch refused {step.name}: {lines[-1].strip()}") from error
    return [job.job_id for job in jobs]


def preview(folder: Path, step: Step, resources: Resources) -> str:
    """Returns the text that --dry-run prints for a step: on SLURM the sbatch script, and the commands of the jobs."""
    lines = [f"# {step.name}"]
    if resources.cluster == "slurm":
        chosen = executor(folder, step, resources, [f"<{name}>" for name in step.after])
        if len(step.commands) > 1:
            chosen.parameters["map_count"] = len(step.commands)
        lines.append(chosen._make_submission_file_text(chosen._submitit_command_str, "dry-run"))
    return "\n".join(lines + [f"# runs: {json.dumps(command)}" for command in step.commands]) + "\n"
