"""Submits, follows, cancels and resumes the jobs of a pipeline or sweep.

All state is in the folder of the pipeline or sweep, in `jobs.json` and in submitit's files. On SLURM the scheduler
starts a job when the jobs before it have succeeded. So no process of ours has to stay alive. With `--cluster local`
the submitting command runs the jobs one after the other.
"""

import contextlib
import signal
import subprocess
import time
from dataclasses import asdict
from pathlib import Path

import psutil

from d2s.common.files import read_json, write_json
from d2s.launchers.executors import Command, Resources, Step, apply_site_settings, executor, submit_step
from d2s.launchers.states import ENDED, LOGS, UNKNOWN, local_controller, requeue_file, slurm_states, succeeded

JOBS = "jobs.json"
# Seconds that a local job gets to end after each signal. SLURM's KillWait has the same default.
KILL_WAIT = 30


class Jobs:
    """The steps of a pipeline or sweep. They are in an order in which they can run. `folder` holds their files."""

    def __init__(self, folder: Path, resources: Resources, steps: list[Step]) -> None:
        self.folder, self.resources, self.steps = folder, resources, steps

    @classmethod
    def load(cls, folder: Path) -> "Jobs":
        """Returns the jobs that `save` wrote to jobs.json in `folder`. Raises ValueError if there is no such file."""
        if not (folder / JOBS).is_file():
            raise ValueError(f"{folder} holds no {JOBS}: name the --out of a pipeline or sweep")
        saved = read_json(folder / JOBS)
        return cls(folder, Resources(**saved["resources"]), [Step(**step) for step in saved["steps"]])

    def save(self) -> None:
        """Writes the steps and resources to jobs.json in `folder`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        steps = [asdict(step) for step in self.steps]
        write_json(self.folder / JOBS, {"resources": asdict(self.resources), "steps": steps})

    @property
    def local(self) -> bool:
        """Whether the jobs run on this machine, without SLURM."""
        return self.resources.cluster == "local"

    def submit(self) -> None:
        """Saves all steps. On SLURM, submits each step that has no jobs yet and has not succeeded.

        Raises ValueError if sbatch refuses a step. All steps that this call submitted are then cancelled.
        """
        self.save()
        if self.local:
            return
        apply_site_settings()
        by_name = {step.name: step for step in self.steps}
        submitted: list[Step] = []
        for step in self.steps:
            if step.ids or step.state == "COMPLETED":
                continue
            after = [by_name[name].ids[0].split("_")[0] for name in step.after if by_name[name].ids]
            try:
                step.ids = submit_step(self.folder, step, self.resources, after)
            except ValueError as error:
                for earlier in reversed(submitted):
                    _scancel(earlier)
                    earlier.ids = []
                self.save()
                raise ValueError(
                    f"{error}; nothing is queued: mend it, then `resume {self.folder}`, with other --nodes, --tasks, "
                    "--cpus or --minutes if need be"
                ) from error
            submitted.append(step)
            self.save()

    def run_locally(self) -> None:
        """Runs the steps on this machine, one after the other. Stops after a step that fails."""
        for step in self.steps:
            if step.state == "COMPLETED":
                continue
            for arguments in step.commands:
                print(f"{step.name}: {' '.join(arguments)}", flush=True)
                job = self._run_job(step, arguments)
                # This loop restarts the job, because submitit itself restarts a job only a few times.
                while requeue_file(self.folder / LOGS, job).exists():
                    print(f"{step.name}: ran out of time, goes on from its checkpoint", flush=True)
                    job = self._run_job(step, arguments)
                if not succeeded(self.folder, job):
                    self._set_state(step, "FAILED")
                    return
            self._set_state(step, "COMPLETED")

    def _run_job(self, step: Step, arguments: list[str]) -> str:
        """Starts a local job and waits until it has ended. Returns the job's number."""
        job = executor(self.folder, step, self.resources, []).submit(Command(arguments))
        step.ids.append(job.job_id)
        self._set_state(step, "RUNNING")
        try:
            while not job.done():
                time.sleep(0.2)
        except BaseException:
            _terminate(job.job_id)
            self._set_state(step, "CANCELLED")
            raise
        return job.job_id

    def _set_state(self, step: Step, state: str) -> None:
        step.state = state
        self.save()

    def states(self, step: Step) -> list[str]:
        """Returns the state of each job of a step, in SLURM's terms. Returns ["PENDING"] if it was not submitted."""
        if not self.local and step.ids:
            return slurm_states(step.ids, self.folder)
        if step.state == "RUNNING" and local_controller(step.ids[-1]) is None:
            return ["FAILED"]  # the submitting command was killed before it saved the state
        return [step.state or "PENDING"]

    def wait(self) -> bool:
        """Waits until all jobs have ended. Prints each change of a state. Returns whether all jobs succeeded."""
        states: dict[str, list[str]] = {step.name: [""] for step in self.steps}
        printed: dict[str, str] = {}
        start = time.monotonic()
        while True:
            for step in self.steps:
                if _ended(states[step.name]):
                    continue
                new = states[step.name] = self.states(step)
                text = ", ".join(f"{new.count(s)} {s}" if len(new) > 1 else s for s in sorted(set(new)))
                if printed.get(step.name) != text:
                    printed[step.name] = text
                    print(f"{step.name:<10} {text}", flush=True)
            # Local jobs have already ended. A local step that is still PENDING will not start.
            if self.local or all(map(_ended, states.values())):
                return all(state == "COMPLETED" for found in states.values() for state in found)
            # To spare SLURM's controller, the interval grows from 2 s to 30 s in the first half hour.
            time.sleep(min(30.0, max(2.0, (time.monotonic() - start) / 60)))

    def cancel(self) -> None:
        """Cancels all jobs that are running or pending."""
        for step in reversed(self.steps):
            if not self.local:
                _scancel(step)
            elif step.state == "RUNNING":
                requeue_file(self.folder / LOGS, step.ids[-1]).unlink(missing_ok=True)
                _terminate(step.ids[-1])
                self._set_state(step, "CANCELLED")

    def reset_unsuccessful(self) -> int:
        """Resets the steps that did not succeed, so that `submit` starts them again. Returns how many were reset.

        Raises ValueError if a step is running or pending, or if SLURM does not answer.
        """
        count = 0
        for step in self.steps:
            states = self.states(step)
            if UNKNOWN in states:
                raise ValueError(
                    f"{step.name}: SLURM does not say what became of it; try again once it answers"
                )
            if step.ids and not _ended(states):
                raise ValueError(f"{step.name} is {states[0]}: cancel it first, or wait for it")
            done = all(state == "COMPLETED" for state in states)
            step.state, step.ids = "COMPLETED" if done else "", []
            count += not done
        return count


def _ended(states: list[str]) -> bool:
    return all(state in ENDED for state in states)


def _scancel(step: Step) -> None:
    for job in sorted({id_.partition("_")[0] for id_ in step.ids}):  # one call cancels a whole array
        subprocess.run(["scancel", job], check=False)


def _terminate(pid: str) -> None:
    """Ends the local job whose submitit controller has the process number `pid`. Sends TERM, then INT, then KILL.

    TERM comes first, as with scancel, because the job then writes a checkpoint. A background process ignores INT.
    """
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGKILL):
        process = local_controller(pid)
        if process is None:
            return
        with contextlib.suppress(psutil.NoSuchProcess, psutil.TimeoutExpired):
            process.send_signal(number)
            process.wait(KILL_WAIT)
