"""Workers forked from a process that has imported all that a training needs: each starts in a moment.

A new interpreter spends seven seconds on these imports. The workers are processes like any others, with an
environment, output and exit code of their own.
"""

import functools
import multiprocessing
import os
import resource
import sys
import tempfile
from importlib import import_module
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from subprocess import CompletedProcess, TimeoutExpired
from unittest import mock

from d2s.common.ports import free_port

IMPORTS = [
    *(
        "torch",
        "deepspeed",
        "torch.utils.tensorboard",
        "d2s.train",
        "d2s.training.build",
        "d2s.training.recipes",
    ),
    # What is imported once a model is built or a data set is opened.
    *("transformers.models.resnet.modeling_resnet", "transformers.models.vit.modeling_vit"),
    *("transformers.models.bert.modeling_bert", "pyarrow.dataset", "dateutil.relativedelta"),
    # multiprocessing imports the parent's main module again in each child.
    "pytest",
]


@functools.cache
def context() -> ForkServerContext:
    """The context of multiprocessing whose processes are forked from the one that has imported everything."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(IMPORTS)
    with mock.patch.dict(os.environ, DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1", D2S_THREADS="1"):
        forkserver.ensure_running()
    return found


def start(
    function: str, *arguments: object, folder: Path, workers: int = 1, **environment: str
) -> list[ForkServerProcess]:
    """Starts `function(*arguments)` in new processes, which write FOLDER/RANK.out and FOLDER/RANK.err.

    function: MODULE:NAME; the module is imported in the process, under its environment.
    workers: more than one are told that they are one group.
    environment: with NEW_SESSION each process leads a session, so that its children can be signalled with it.
    """
    group = {"WORLD_SIZE": str(workers), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = []
    for rank in range(workers):
        own = {**group, "RANK": str(rank), "LOCAL_RANK": str(rank)} if workers > 1 else {}
        given = (function, arguments, {**own, **environment}, str(folder / str(rank)))
        processes.append(context().Process(target=_work, args=given))
        processes[-1].start()
    return processes


def _work(function: str, arguments: tuple, environment: dict[str, str], output: str) -> None:
    if environment.pop("NEW_SESSION", ""):
        os.setsid()
    os.environ.update(environment)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{output}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), number)
    module, _, name = function.partition(":")
    getattr(import_module(module), name)(*arguments)


def run(
    function: str, *arguments: object, workers: int = 1, timeout: float = 280, **environment: str
) -> CompletedProcess:
    """The same until all processes have ended: the first exit code that is not 0, and what all of them wrote."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        processes = start(function, *arguments, folder=folder, workers=workers, **environment)
        for process in processes:
            process.join(timeout)
            if process.exitcode is None:
                for one in processes:
                    one.kill()
                raise TimeoutExpired(function, timeout, *_written(folder, workers))
        code = next((p.exitcode for p in processes if p.exitcode), 0)
        return CompletedProcess(function, code, *_written(folder, workers))


def _written(folder: Path, workers: int) -> tuple[str, str]:
    out, err = (
        "".join((folder / f"{rank}.{name}").read_text() for rank in range(workers)) for name in ("out", "err")
    )
    return out, err


def train(arguments: list[str], largest_file: int | None = None) -> None:
    """What `d2s/train.py ARGUMENTS` does. For start and run, as "forked:train".

    largest_file: no file may grow beyond so many bytes, as if the disk were full.
    """
    from d2s.train import run

    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, resource.RLIM_INFINITY))
    sys.argv = ["train.py", *arguments]
    run()
