"""A training of several workers as the drill sees it: started, watched from outside, killed.

Nothing here asks the training for anything: what it has done is read from its run folder, and its workers are found
among the machine's processes, so a job that another launcher started can be drilled too.
"""

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

import psutil

from d2s.common.ports import free_port
from d2s.training.run_log import read_rows

TRAIN = Path(__file__).resolve().parents[1] / "train.py"
POLL = 0.01


@dataclass
class Job:
    """One incarnation of the training: its processes, and the files that they speak into."""

    processes: list[subprocess.Popen]
    run: Path
    logs: list[Path]
    launched: bool
    """A launcher's process, not the workers', is what was started."""
    started: float = field(default_factory=time.monotonic)

    def workers(self) -> list[int]:
        """Process numbers of the workers, in the order of their ranks."""
        if self.launched:
            return workers_of(self.run)
        return [process.pid for process in self.processes if process.poll() is None]

    def ended(self) -> bool:
        return all(process.poll() is not None for process in self.processes)

    def codes(self) -> list[int | None]:
        return [process.poll() for process in self.processes]

    def wait(self, seconds: float) -> bool:
        """Whether all processes ended within `seconds`."""
        return wait_until(self.ended, seconds)

    def end(self) -> None:
        """Ends what still runs, children included."""
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # each leads a group of its own
            process.wait()

    def complaint(self) -> str:
        """The last line that a worker wrote, the first one's before all others'."""
        for log in self.logs:
            lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            if lines and "error" in lines[-1].lower():
                return lines[-1]
        return f"see {self.logs[0]}"


def start_job(arguments: Sequence[str], run: Path, world: int, log: Path, launcher: str = "",
              script: Path = TRAIN) -> Job:  # fmt: skip
    """Starts `train.py ARGUMENTS --run RUN --resume` with `world` workers.

    launcher: a command to put before it, {workers} standing for their number; without one the workers are started
    here. log: where they speak into, the rank or "launcher" added to its name. script: run in place of train.py.
    """
    train = [str(script), *arguments, "--run", str(run), "--resume"]
    log.parent.mkdir(parents=True, exist_ok=True)
    common = {"D2S_THREADS": os.environ.get("D2S_THREADS", "1")}  # the same on any number of workers
    if launcher:
        command = [part.replace("{workers}", str(world)) for part in shlex.split(launcher)]
        path = log.with_name(f"{log.name}-launcher.txt")
        return Job([_spawn([*command, *train], path, common)], run, [path], launched=True)
    common |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    paths = [log.with_name(f"{log.name}-rank{rank}.txt") for rank in range(world)]
    processes = [
        _spawn([sys.executable, *train], path, {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank, path in enumerate(paths)
    ]
    return Job(processes, run, paths, launched=False)


def _spawn(command: list[str], log: Path, variables: dict[str, str]) -> subprocess.Popen:
    with open(log, "wb") as file:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
            env={**os.environ, **variables}, start_new_session=True,
        )  # fmt: skip


def workers_of(run: Path) -> list[int]:
    """Process numbers, by rank, of the workers on this machine that train into `run`, whoever started them.

    A worker has a rank in its environment; its loader processes do too, but a worker is their parent.
    """
    found: dict[int, tuple[int, int]] = {}
    for process in psutil.process_iter(["pid", "ppid", "cmdline"]):
        if not _trains_into(process.info["cmdline"] or [], process, run):
            continue
        with contextlib.suppress(psutil.Error):
            rank = process.environ().get("RANK", "")
            if rank.isdigit():
                found[process.pid] = (int(rank), process.info["ppid"])
    workers = [(rank, pid) for pid, (rank, parent) in found.items() if parent not in found]
    return [pid for _, pid in sorted(workers)]


def _trains_into(command: list[str], process: psutil.Process, run: Path) -> bool:
    names = [Path(part).name for part in command]
    if not ({"train.py", "d2s.train"} & set(names) or ("d2s" in names and "train" in names)):
        return False
    for place, part in enumerate(command):
        value = command[place + 1] if part == "--run" and place + 1 < len(command) else ""
        value = part.removeprefix("--run=") if part.startswith("--run=") else value
        if value:
            with contextlib.suppress(psutil.Error):
                return (Path(process.cwd()) / value).resolve() == run.resolve()
    return False


def kill(workers: Sequence[int]) -> int:
    """SIGKILL to each; returns how many were still there."""
    hit = 0
    for pid in workers:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
            hit += 1
    return hit


def last_step(run: Path) -> int:
    """The last step that metrics.jsonl holds, 0 where it holds none."""
    return max((row["step"] for row in read_rows(run) if row["kind"] == "train"), default=0)


def hidden(run: Path) -> dict[str, int]:
    """What is being written below checkpoints/ under a hidden name, or was left behind: name and time, in ns."""
    found = {}
    for path in (run / "checkpoints").glob(".*"):
        with contextlib.suppress(FileNotFoundError):
            found[path.name] = path.stat().st_mtime_ns
    return found


def signature(path: Path) -> tuple[int, int, int]:
    """What changes with every write to a file, or zeros where there is none."""
    try:
        facts = path.stat()
    except FileNotFoundError:
        return (0, 0, 0)
    return facts.st_ino, facts.st_size, facts.st_mtime_ns


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    """Whether the condition became true within `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL)
    return True
