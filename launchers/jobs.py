"""Jobs through submitit: how they hang together, and what became of them.

A folder of jobs (`jobs.json` and submitit's own files) is all there is to know; nothing runs in between. On SLURM
the scheduler chains the jobs; on this machine the caller does, one after the other.
"""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import submitit

from d2s.common.files import read_json, write_json
from d2s.launchers.executors import Command, Resources, Step, executor, hand_over, use_site
from d2s.launchers.states import ENDED, LOGS, UNKNOWN, alive, slurm_states, succeeded
from d2s.launchers.task import local_request

JOBS = "jobs.json"
# Seconds between two signals to a job here, as is common on clusters.
KILL_WAIT = 30


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
        """Hands every step that has no job yet to SLURM; a local one is only written down, for :meth:`work`.

        Raises ValueError where sbatch refuses one; those before it are taken back.
        """
        self.save()
        if self.resources.cluster == "local":
            return
        use_site()
        by_name = {step.name: step for step in self.steps}
        fresh: list[Step] = []
        for step in self.steps:
            if step.ids or step.state == "COMPLETED":
                continue
            after = [by_name[name].ids[0].split("_")[0] for name in step.after if by_name[name].ids]
            try:
                step.ids = hand_over(self.folder, step, self.resources, after)
            except ValueError as error:
                self._take_back(fresh)
                raise ValueError(
                    f"{error}; nothing is queued: mend it, then `resume {self.folder}`, with other --nodes, --tasks, "
                    "--cpus or --minutes if need be"
                ) from error
            fresh.append(step)
            self.save()

    def _take_back(self, steps: list[Step]) -> None:
        for step in reversed(steps):
            _scancel(step)
            step.ids = []
        self.save()

    def work(self, say: Callable[[str], None]) -> None:
        """Runs the steps here, one after the other; stops at the first that fails."""
        for step in self.steps:
            if step.state == "COMPLETED":
                continue
            for arguments in step.commands:
                say(f"{step.name}: {' '.join(arguments)}")
                number = self._run(step, arguments)
                # submitit starts a job that ran out of time a few times only.
                while local_request(self.folder / LOGS, number).exists():
                    say(f"{step.name}: ran out of time, goes on from its checkpoint")
                    number = self._run(step, arguments)
                if not succeeded(self.folder, number):
                    step.state = "FAILED"
                    self.save()
                    return
            step.state = "COMPLETED"
            self.save()

    def _run(self, step: Step, arguments: list[str]) -> str:
        """Runs one job here to its end; its number."""
        job = executor(self.folder, step, self.resources, []).submit(Command(arguments))
        step.ids.append(job.job_id)
        step.state = "RUNNING"
        self.save()
        try:
            _wait_local(job)
        except BaseException:
            _end(job.job_id)
            step.state = "CANCELLED"
            self.save()
            raise
        return job.job_id

    def states(self, step: Step) -> list[str]:
        """The state of each of a step's jobs, in SLURM's words; PENDING before it was submitted."""
        if self.resources.cluster == "slurm" and step.ids:
            return slurm_states(step.ids, self.folder)
        if step.state == "RUNNING" and not alive(step.ids[-1]):
            return ["FAILED"]  # the command that ran it was killed, and could not note it
        return [step.state or "PENDING"]

    def watch(self, say: Callable[[str], None]) -> bool:
        """Waits until all jobs have ended, saying what changes. Returns whether all succeeded."""
        known: dict[str, str] = {}
        last: dict[str, list[str]] = {}
        start = time.monotonic()
        while True:
            for step in self.steps:
                states = last.get(step.name, [""])
                if all(state in ENDED for state in states):
                    continue
                last[step.name] = states = self.states(step)
                text = ", ".join(
                    f"{states.count(s)} {s}" if len(states) > 1 else s for s in sorted(set(states))
                )
                if known.get(step.name) != text:
                    known[step.name] = text
                    say(f"{step.name:<10} {text}")
            found = [state for states in last.values() for state in states]
            # Here nothing runs after :meth:`work`; what is pending behind a failed step never will.
            if self.resources.cluster == "local" or all(state in ENDED for state in found):
                return all(state == "COMPLETED" for state in found)
            # A controller serves many: who waits for hours asks it twice a minute.
            time.sleep(min(30.0, max(2.0, (time.monotonic() - start) / 60)))

    def cancel(self) -> None:
        """Ends whatever still runs or waits."""
        for step in reversed(self.steps):
            if self.resources.cluster == "slurm":
                _scancel(step)
            elif step.state == "RUNNING":
                local_request(self.folder / LOGS, step.ids[-1]).unlink(missing_ok=True)
                if alive(step.ids[-1]):
                    _end(step.ids[-1])
                step.state = "CANCELLED"
                self.save()

    def again(self) -> int:
        """Forgets the jobs that did not succeed, so that :meth:`submit` starts them again; how many steps."""
        count = 0
        for step in self.steps:
            states = self.states(step)
            if UNKNOWN in states:
                raise ValueError(
                    f"{step.name}: SLURM does not say what became of it; try again once it answers"
                )
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


def _scancel(step: Step) -> None:
    # An array's jobs at once.
    for number in sorted({number.partition("_")[0] for number in step.ids}):
        subprocess.run(["scancel", number], check=False)


def _end(pid: str) -> None:
    """As scancel does: TERM, which leaves a training the time to write a checkpoint, and in the end no more of it.

    Not INT at once: a controller that a script started in the background does not hear that.
    """
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGKILL):
        try:
            os.kill(int(pid), number)
        except ProcessLookupError:
            return
        end = time.monotonic() + KILL_WAIT
        while alive(pid) and time.monotonic() < end:
            time.sleep(0.1)
        if not alive(pid):
            return


def logs_of(folder: Path, number: str, rank: int = 0) -> Iterator[Path]:
    """The files that a job's rank wrote to."""
    for kind in ("out", "err"):
        path = folder / LOGS / f"{number}_{rank}_log.{kind}"
        if path.is_file():
            yield path
