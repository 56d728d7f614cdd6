"""Real trainings in which something happens to a worker at an exact point; run as scripts by the tests beside it.

`faults.py ARGUMENTS` is `train.py ARGUMENTS` with the fault that FAULT names, for use under a launcher.
`faults.py --trials FILE` makes the jobs that FILE lists, one after the other and without any launcher: each is
two processes forked from this one, which has imported everything already.

A fault: {"rank": 1 or null for all, "step": 3, "kind": one of KINDS}.
"""

import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[2])
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
BOOM = "boom: a planted fault"


def _raise() -> None:
    raise KeyError(BOOM)


KINDS: dict[str, Callable[[], object]] = {
    "raise": _raise,
    "exit": lambda: sys.exit(0),
    "hard exit": lambda: os._exit(0),
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "term": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "usr2": lambda: os.kill(os.getpid(), signal.SIGUSR2),
}


def plant(fault: dict[str, Any]) -> None:
    """Makes the fault happen in this worker, if it is meant, before its training step of that number."""
    from d2s.trainer import Trainer

    if fault["rank"] not in (None, int(os.environ["RANK"])):
        return
    real = Trainer._train_step

    def step(self: Trainer, batch: Any) -> Any:
        if self.step == fault["step"]:
            KINDS[fault["kind"]]()
        return real(self, batch)

    Trainer._train_step = step


def trial(arguments: list[str], fault: dict[str, Any], screen: Path) -> dict[str, Any]:
    """Two workers without a launcher. Returns their exit codes (-9: killed) and the seconds after the first left."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    children = {}
    for rank in (0, 1):
        pid = os.fork()
        if not pid:
            _work(arguments, fault, screen, rank, port)
        children[pid] = rank
    codes, left = {}, []
    deadline = time.monotonic() + 120
    while children:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            codes[children.pop(pid)] = os.waitstatus_to_exitcode(status)
            left.append(time.monotonic())
            deadline = left[0] + 60
        elif time.monotonic() > deadline:
            for other in children:
                os.kill(other, signal.SIGKILL)
        else:
            time.sleep(0.01)
    return {"codes": [codes[0], codes[1]], "seconds": left[-1] - left[0], "screen": screen.read_text()}


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
        import deepspeed  # noqa: F401
        import torch.utils.tensorboard  # noqa: F401

        import d2s.prepare  # noqa: F401

        for line in json.loads(Path(sys.argv[2]).read_text()):
            print(json.dumps(trial(line["arguments"], line["fault"], Path(line["screen"]))), flush=True)
    else:
        plant(json.loads(os.environ["FAULT"]))
        from d2s.train import run

        run()
