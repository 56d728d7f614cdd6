"""Real trainings in which something happens to a worker at an exact point; run as scripts by the tests beside it.

`faults.py ARGUMENTS` is `train.py ARGUMENTS` with the fault that FAULT names, for use under a launcher.
`faults.py --trials FILE` makes the jobs that FILE lists, a few at a time and without any launcher: each is two
processes forked from this one, which has imported everything already.

A fault: {"rank": 1 or null for all, "step": 3, "kind": one of KINDS, "mark": a file to touch at that moment}.
"""

import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import forked

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
BOOM = "boom: a planted fault"


def _raise() -> None:
    raise KeyError(BOOM)


def _pause() -> None:
    """Stops this process, as a debugger would, for some seconds."""
    worker = os.getpid()
    if not os.fork():
        time.sleep(4)
        os.kill(worker, signal.SIGCONT)
        os._exit(0)
    os.kill(worker, signal.SIGSTOP)


KINDS: dict[str, Callable[[], object]] = {
    "raise": _raise,
    "exit": lambda: sys.exit(0),
    "hard exit": lambda: os._exit(0),
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "pause": _pause,
    "none": lambda: None,
}


def plant(fault: dict[str, Any]) -> None:
    """Makes the fault happen in this worker, if it is meant, before its training step of that number."""
    from d2s.training.trainer import Trainer

    if fault["rank"] not in (None, int(os.environ["RANK"])):
        return
    real = Trainer.train_step

    def step(self: Trainer, batch: Any) -> Any:
        if self.state.step == fault["step"]:
            if "mark" in fault:
                Path(fault["mark"]).touch()
            KINDS[fault["kind"]]()
        return real(self, batch)

    Trainer.train_step = step


class Job:
    """Two workers without a launcher."""

    def __init__(self, arguments: list[str], fault: dict[str, Any], screen: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        self.fault, self.screen = fault, Path(screen)
        self.children: dict[int, int] = {}
        for rank in (0, 1):
            pid = os.fork()
            if not pid:
                _work(arguments, fault, self.screen, rank, port)
            self.children[rank] = pid
        self.codes: dict[int, int] = {}
        self.left: list[float] = []
        self.deadline = time.monotonic() + 240

    def poll(self) -> bool:
        """Whether both workers have left; past a deadline they are made to."""
        for rank, pid in self.children.items():
            if rank in self.codes:
                continue
            if time.monotonic() > self.deadline:
                os.kill(pid, signal.SIGKILL)
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                self.codes[rank] = os.waitstatus_to_exitcode(status)
                self.left.append(time.monotonic())
                self.deadline = self.left[0] + 60
        return len(self.codes) == 2

    def outcome(self) -> dict[str, Any]:
        """Exit codes (-9: killed), seconds from the first worker's end to the other's, and what was shown."""
        seconds, codes = self.left[1] - self.left[0], [self.codes[0], self.codes[1]]
        return {"fault": self.fault, "codes": codes, "seconds": seconds, "screen": self.screen.read_text()}


def run_all(trials: list[dict[str, Any]], at_once: int) -> None:
    """Makes all trials, and prints what came of each."""
    active: list[Job] = []
    while trials or active:
        while trials and len(active) < at_once:
            active.append(Job(**trials.pop(0)))
        time.sleep(0.05)
        for job in [job for job in active if job.poll()]:
            active.remove(job)
            print(json.dumps(job.outcome()), flush=True)


def _work(arguments: list[str], fault: dict[str, Any], screen: Path, rank: int, port: str) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    handle = os.open(screen, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    sys.argv = ["train.py", *arguments]
    plant(fault)
    from d2s.train import run

    run()


if __name__ == "__main__":
    if sys.argv[1] == "--trials":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        for name in forked.IMPORTS:
            import_module(name)
        run_all(json.loads(Path(sys.argv[2]).read_text()), at_once=4)
    else:
        plant(json.loads(os.environ["FAULT"]))
        from d2s.train import run

        run()
