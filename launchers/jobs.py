"""Jobs through submitit: what a job runs, where it runs, how they hang together, and what became of them.

A folder of jobs (`jobs.json` and submitit's own files) is all there is to know; nothing runs in between. On SLURM
the scheduler chains the jobs; on this machine the caller does, one after the other.
"""

import atexit
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import submitit

from d2s.distributed import leave
from d2s.launchers import task
from d2s.shards.files import read_json, write_json

JOBS = "jobs.json"
LOGS = "submitit"
# submitit's local controller starts the tasks again after this exit code.
LOCAL_REQUEUE = 144
Cluster = Literal["slurm", "local"]
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE", "BOOT_FAIL")


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
        outcome = task.run(self.arguments)
        if outcome.requeue and os.environ.get("SUBMITIT_EXECUTOR") == "local":
            sys.stdout.flush()
            os._exit(LOCAL_REQUEUE)
        if outcome.requeue:
            task.requeue()
        if "torch" in sys.modules:
            # After submitit has written the result: the way out that gloo's threads cannot turn into an abort.
            atexit.register(leave, outcome.code, together=outcome.together)
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


def executor(folder: Path, step: Step, resources: Resources, after: list[str]) -> submitit.Executor:
    """submitit's executor for one step; `after` holds the job numbers that must succeed first."""
    tasks, nodes = (resources.tasks, resources.nodes) if step.wide else (1, 1)
    if resources.cluster == "local":
        local = submitit.LocalExecutor(folder / LOGS)
        local.update_parameters(
            timeout_min=resources.minutes, tasks_per_node=tasks, signal_delay_s=resources.signal_seconds
        )
        return local
    # The shell's words of job.sh: a container's options and the environment's python.
    slurm = submitit.SlurmExecutor(
        folder / LOGS, max_num_timeout=10_000, python='"${container[@]}" "${python[@]}"'
    )
    more: dict[str, Any] = {"requeue": True, "kill-on-invalid-dep": "yes"}
    if resources.gpus and (step.wide or step.gpu):
        # A site may call its GPUs gpu:h100.
        kind = site_settings().get("SBATCH_GRES", "gpu:1").rpartition(":")[0] or "gpu"
        more["gres"] = f"{kind}:{tasks}"
    slurm.update_parameters(
        job_name=f"d2s-{step.name}",
        time=resources.minutes,
        nodes=nodes,
        ntasks_per_node=tasks,
        cpus_per_task=resources.cpus,
        signal_delay_s=resources.signal_seconds,
        setup=["source launchers/job.sh"],
        srun_args=["--kill-on-bad-exit=1", f"--cpus-per-task={resources.cpus}"],
        dependency=f"afterok:{':'.join(after)}" if after else None,
        additional_parameters=more,
    )
    return slurm


class Jobs:
    """The steps of one command, in an order in which each stands after those it needs, and their folder."""

    def __init__(self, folder: Path, resources: Resources, steps: list[Step]) -> None:
        self.folder, self.resources, self.steps = folder, resources, steps

    @classmethod
    def load(cls, folder: Path) -> "Jobs":
        """The jobs that were submitted with this folder. ValueError where there are none."""
        if not (folder / JOBS).is_file():
            raise ValueError(f"{folder} holds no {JOBS}: name the --out of a pipeline or sweep")
        held = read_json(folder / JOBS)
        return cls(folder, Resources(**held["resources"]), [Step(**step) for step in held["steps"]])

    def save(self) -> None:
        """Writes jobs.json."""
        self.folder.mkdir(parents=True, exist_ok=True)
        held = {"resources": asdict(self.resources), "steps": [asdict(step) for step in self.steps]}
        write_json(self.folder / JOBS, held)

    def submit(self) -> None:
        """Hands every step that has no job yet to SLURM; a local one is only written down, for :meth:`work`."""
        self.save()
        if self.resources.cluster == "local":
            return
        environment = {name: value for name, value in site_settings().items() if name.startswith("SBATCH_")}
        environment.pop("SBATCH_GRES", None)  # it would win over what each step asks for
        os.environ.update(environment)
        by_name = {step.name: step for step in self.steps}
        for step in self.steps:
            if step.ids or step.state == "COMPLETED":
                continue
            after = [by_name[name].ids[0].split("_")[0] for name in step.after if by_name[name].ids]
            jobs = self._hand_over(step, after)
            step.ids = [job.job_id for job in jobs]
            self.save()

    def _hand_over(self, step: Step, after: list[str]) -> list[submitit.Job]:
        chosen = executor(self.folder, step, self.resources, after)
        with chosen.batch():
            jobs = [chosen.submit(Command(arguments)) for arguments in step.commands]
        return jobs

    def work(self, say: Callable[[str], None]) -> None:
        """Runs the steps here, one after the other; stops at the first that fails."""
        for step in self.steps:
            if step.state == "COMPLETED":
                continue
            for arguments in step.commands:
                say(f"{step.name}: {' '.join(arguments)}")
                job = executor(self.folder, step, self.resources, []).submit(Command(arguments))
                step.ids.append(job.job_id)
                step.state = "RUNNING"
                self.save()
                try:
                    _wait_local(job)
                except BaseException:
                    job.cancel()
                    step.state = "CANCELLED"
                    self.save()
                    raise
                if not succeeded(self.folder, job.job_id):
                    step.state = "FAILED"
                    self.save()
                    return
            step.state = "COMPLETED"
            self.save()

    def states(self, step: Step) -> list[str]:
        """The state of each of a step's jobs, in SLURM's words; PENDING before it was submitted."""
        if self.resources.cluster == "local":
            return [step.state or "PENDING"]
        return [slurm_state(job, self.folder) for job in step.ids] or [step.state or "PENDING"]

    def watch(self, say: Callable[[str], None], every: float = 2.0) -> bool:
        """Waits until all jobs have ended, saying what changes. Returns whether all succeeded."""
        known: dict[str, str] = {}
        while True:
            ended, good = True, True
            for step in self.steps:
                states = self.states(step)
                text = ", ".join(
                    f"{states.count(s)} {s}" if len(states) > 1 else s for s in sorted(set(states))
                )
                if known.get(step.name) != text:
                    known[step.name] = text
                    say(f"{step.name:<10} {text}")
                ended &= all(state in ENDED for state in states)
                good &= all(state == "COMPLETED" for state in states)
            if ended:
                return good
            time.sleep(every)

    def cancel(self) -> None:
        """Ends whatever still runs or waits."""
        for step in reversed(self.steps):
            for number in step.ids:
                if self.resources.cluster == "slurm":
                    subprocess.run(["scancel", number], check=False)
                elif step.state == "RUNNING":
                    _interrupt(int(number))

    def again(self) -> int:
        """Forgets the jobs that did not succeed, so that :meth:`submit` starts them again; how many steps."""
        count = 0
        for step in self.steps:
            states = self.states(step)
            if any(state not in ENDED for state in states) and step.ids:
                raise ValueError(f"{step.name} is {states[0]}: cancel it first, or wait for it")
            if all(state == "COMPLETED" for state in states):
                step.state, step.ids = "COMPLETED", []
            else:
                step.state, step.ids = "", []
                count += 1
        return count


def _wait_local(job: submitit.Job) -> None:
    while not job.done():
        time.sleep(0.2)


def _interrupt(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGINT)
    except ProcessLookupError:
        return


def slurm_state(number: str, folder: Path) -> str:
    """What became of a job: by the controller's memory, or accounting, or the results that its tasks left."""
    shown = _output(["scontrol", "show", "job", "-o", number])
    for word in shown.split():
        if word.startswith("JobState="):
            return word.removeprefix("JobState=")
    lines = _output(["sacct", "-n", "-X", "-P", "-o", "State", "-j", number]).split()
    if lines:
        return lines[0]
    return "COMPLETED" if succeeded(folder, number) else "FAILED"


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False).stdout
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return ""


def succeeded(folder: Path, number: str) -> bool:
    """Whether every task of a job has left a good result."""
    results = list((folder / LOGS).glob(f"{number}_*_result.pkl"))
    return bool(results) and all(_good(path) for path in results)


def _good(path: Path) -> bool:
    # Our own pickle, written by submitit in our own folder: ("success", 0) or ("error", traceback).
    return submitit.core.utils.pickle_load(path)[0] == "success"


def logs_of(folder: Path, number: str, rank: int = 0) -> Iterator[Path]:
    """The files that a job's rank wrote to."""
    for kind in ("out", "err"):
        path = folder / LOGS / f"{number}_{rank}_log.{kind}"
        if path.is_file():
            yield path


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
