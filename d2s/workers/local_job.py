"""Starts a command as a job of several workers on this machine, watches it from outside, and ends it."""

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from d2s.common.ports import free_port

_POLL_SECONDS = 0.01


@dataclass
class LocalJob:
    """The processes of a job, and the files that they write their output to."""

    processes: list[subprocess.Popen]
    logs: list[Path]
    launched: bool
    """The only process is a launcher, which starts the workers itself."""
    started: float = field(default_factory=time.monotonic)

    def pids(self) -> list[int]:
        """Numbers of the processes that still run, in the order of their ranks."""
        return [process.pid for process in self.processes if process.poll() is None]

    def ended(self) -> bool:
        return not self.pids()

    def codes(self) -> list[int | None]:
        """Exit codes by rank; None for a process that still runs."""
        return [process.poll() for process in self.processes]

    def wait(self, seconds: float) -> bool:
        """Whether all processes ended within `seconds`."""
        return wait_until(self.ended, seconds)

    def end(self) -> None:
        """Kills the processes that still run, with their children."""
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # each leads a group of its own
            process.wait()

    def error(self) -> str:
        """The error message that a worker ended with, of the lowest rank that has one, or where to look for it."""
        for log in self.logs:
            lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            if lines and "error" in lines[-1].lower():
                return lines[-1]
        return f"see {self.logs[0]}"


def start_job(command: Sequence[str], workers: int, log: Path, launcher: str = "") -> LocalJob:
    """Starts `workers` processes of `python COMMAND`, or one launcher that does.

    Args:
        log: path of the output files, to whose name the rank or "launcher" is added.
        launcher: a command to put before `command`, with {workers} in place of their number.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    variables = {"D2S_THREADS": os.environ.get("D2S_THREADS", "1")}  # the same for any number of workers
    if launcher:
        words = [word.replace("{workers}", str(workers)) for word in shlex.split(launcher)]
        path = log.with_name(f"{log.name}-launcher.txt")
        return LocalJob([_spawn([*words, *command], path, variables)], [path], launched=True)
    variables |= {"WORLD_SIZE": str(workers), "LOCAL_WORLD_SIZE": str(workers)}
    variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    logs = [log.with_name(f"{log.name}-rank{rank}.txt") for rank in range(workers)]
    processes = [
        _spawn([sys.executable, *command], path, {**variables, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank, path in enumerate(logs)
    ]
    return LocalJob(processes, logs, launched=False)


def _spawn(command: list[str], log: Path, variables: dict[str, str]) -> subprocess.Popen:
    with open(log, "wb") as file:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
            env={**os.environ, **variables}, start_new_session=True,
        )  # fmt: skip


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    """Whether the condition became true within `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_SECONDS)
    return True
