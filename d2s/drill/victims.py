"""Finds the workers of a run among all processes of this machine, and kills them."""

import contextlib
import os
import signal
from collections.abc import Sequence
from pathlib import Path

import psutil


def workers_of(run: Path) -> list[int]:
    """Returns the process ids of the workers on this machine that train into `run`, ordered by rank.

    A worker has RANK in its environment. The data-loading processes of a worker inherit RANK. They are left out,
    because their parent process has RANK too.
    """
    ranks, parents = {}, {}
    for process in psutil.process_iter(["pid", "ppid", "cmdline"]):
        command = process.info["cmdline"] or []
        with contextlib.suppress(psutil.Error):  # a process may end while it is examined
            if _is_training(command) and _run_folder(command, Path(process.cwd())) == run.resolve():
                rank = process.environ().get("RANK", "")
                if rank.isdigit():
                    ranks[process.pid], parents[process.pid] = int(rank), process.info["ppid"]
    return sorted((pid for pid in ranks if parents[pid] not in ranks), key=lambda pid: (ranks[pid], pid))


def _is_training(command: Sequence[str]) -> bool:
    names = {Path(word).name for word in command}
    return bool(names & {"train.py", "d2s.train"}) or names >= {"d2s", "train"}


def _run_folder(command: Sequence[str], folder: Path) -> Path | None:
    """Returns the --run path of a command that was started in `folder`, or None if it has no --run."""
    for word, following in zip(command, [*command[1:], ""], strict=True):
        value = (
            following if word == "--run" else word.removeprefix("--run=") if word.startswith("--run=") else ""
        )
        if value:
            return (folder / value).resolve()
    return None


def kill(pids: Sequence[int]) -> int:
    """Sends SIGKILL to each process. Returns how many of the processes still existed."""
    killed = 0
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
            killed += 1
    return killed
