"""Checks whether a run may use its run folder, reads and writes config.json in it, and locks it.

runs/<name>/config.json contains the resolved configuration, the data and the initial model. It is written after
the model and data have been set up. So if a command fails before, another command can still use the folder.
"""

import errno
import fcntl
import os
from pathlib import Path
from typing import Any

import torch

from d2s.checkpoint import store as checkpoint
from d2s.checkpoint.restarts import RESTARTS
from d2s.common.files import read_json, write_json
from d2s.common.folders import recover
from d2s.shards.read.stream import is_pattern
from d2s.training.config import TrainConfig, differences

CONFIG, LOCK = "config.json", ".lock"
# Names that a failed command may leave in a run folder. A folder that contains only these counts as empty.
HARMLESS = {LOCK, RESTARTS, "teacher"}
# Fields (or prefixes) that may change when a run is resumed, because they do not affect the loss.
RESUMABLE = (
    *("log.", "checkpoint.", "validation.", "data.loader_workers", "data.damage_budget", "nonfinite_limit"),
    *("engine.zero_stage", "engine.offload_optimizer", "engine.activation_checkpointing"),
)


def check_run(run: Path, config: TrainConfig, origin: dict[str, Any], *, resume: bool) -> Path | None:
    """Returns the checkpoint to resume from, or None for a new run.

    origin: as `RunSpec.origin` returns it.
    Raises ValueError if the command would overwrite an earlier run, or resume it with new settings or data.
    """
    if run.exists() and not run.is_dir():
        raise ValueError(f"--run {run} is a file: name a folder")
    if not run.exists() or all(_harmless(path.name) for path in run.iterdir()):
        return None
    if not resume:
        raise ValueError(f"--run {run} is not empty: choose another folder, or add --resume to go on with it")
    saved = read(run)
    changes = differences(TrainConfig.from_dict(saved["config"]), config)
    changes = {name: pair for name, pair in changes.items() if not name.startswith(RESUMABLE)}
    changes |= {name: (saved.get(name), now) for name, now in origin.items() if _differs(name, saved, now)}
    for name, (was, now) in changes.items():
        raise ValueError(
            f"--resume: {name} was {was!r} in {run} and is now {now!r}; keep it, or start a new run"
        )
    return checkpoint.newest(run)


def _differs(name: str, saved: dict[str, Any], now: str | None) -> bool:
    """Returns whether a resumed run would have another origin than the saved run."""
    was = saved.get(name)
    if name == "fingerprint" or not was or not now:
        return was != now
    # Older runs saved paths relative to the working directory of their start.
    parts = Path(was).parts
    return Path(now).parts[-len(parts) :] != parts


def _harmless(name: str) -> bool:
    # A killed process may leave a hidden temporary file.
    return name in HARMLESS or (name.startswith(".") and name.endswith(".tmp"))


def read(run: Path) -> dict[str, Any]:
    """Returns the content of the run's config.json. Raises ValueError if it is missing or damaged."""
    path = run / CONFIG
    if not path.is_file():
        raise ValueError(f"{run} holds no run (no {CONFIG}): choose another folder")
    saved = read_json(path)
    if not isinstance(saved, dict) or not isinstance(saved.get("config"), dict):
        raise ValueError(f"{path} is not a run's configuration: restore it, or choose another folder")
    return saved


def data_of(run: Path) -> str | None:
    """Returns the data of an earlier run, or None if the folder contains no run.

    Raises ValueError if the data set is no longer where it was when the run began.
    """
    data = read(run).get("data") if (run / CONFIG).is_file() else None
    if data and not is_pattern(data) and not os.path.isdir(data):
        raise ValueError(
            f"{run} was trained on {data}, which is no folder here: name its data set with --data"
        )
    return data


def write(run: Path, config: TrainConfig, origin: dict[str, Any], world: int) -> None:
    """Writes config.json atomically. origin: as `RunSpec.origin` returns it. world: number of workers."""
    content = {"config": config.to_dict(), **origin, "workers": world, "torch": torch.__version__}
    write_json(run / CONFIG, content)


def claim(run: Path) -> int:
    """Creates the run folder and locks it for this process until the returned file descriptor is closed.

    Raises ValueError if another process uses the folder.
    """
    run.mkdir(parents=True, exist_ok=True)
    handle = os.open(run / LOCK, os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(
            f"--run {run} is in use by another process: wait for it, or choose another folder"
        ) from None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP):  # the file system has no locks: go on without
            raise
    recover(run)
    return handle
