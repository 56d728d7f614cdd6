"""Starts a command as several worker processes on this machine, waits for them, and ends them."""

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
    """The processes of a job, and the log files with their output."""

    processes: list[subprocess.Popen]
    logs: list[Path]
    launched: bool
    """True if `processes` contains only a launcher, which starts the workers."""
    started: float = field(default_factory=time.monotonic)

    def pids(self) -> list[int]:
        """Returns the process ids of the processes that still run, in rank order."""
        return [process.pid for process in self.processes if process.poll() is None]

    def ended(self) -> bool:
        return not self.pids()

    def codes(self) -> list[int | None]:
        """Returns the exit code of each process, in rank order; None for a process that still runs."""
        return [process.poll() for process in self.processes]

    def wait(self, seconds: float) -> bool:
        """Waits until all processes have ended, at most `seconds`. Returns whether all have ended."""
        return wait_until(self.ended, seconds)

    def end(self) -> None:
        """Kills the processes that still run, and their children."""
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # each process leads its own process group
            process.wait()

    def error(self) -> str:
        """Returns the last line of the first log that ends with an error message; "see PATH" if there is none."""
        for log in self.logs:
            lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            if lines and "error" in lines[-1].lower():
                return lines[-1]
        return f"see {self.logs[0]}"


def start_job(command: Sequence[str], workers: int, log: Path, launcher: str = "") -> LocalJob:
    """Starts `workers` processes of `python COMMAND`, or one launcher that starts them.

    Args:
        command: the arguments of `python`.
        log: start of the log files' paths. The function appends "-rank0.txt" and so on, or "-launcher.txt".
        launcher: the launcher's command line. `command` is appended, and {workers} replaced by the number of workers.
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
    """Waits until `condition()` is true, at most `seconds`. Returns whether the condition became true."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_SECONDS)
    return True
