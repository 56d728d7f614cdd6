"""The run folder: whether it may be used, what it says about its run, and who is using it.

runs/<name>/config.json holds the resolved configuration, the data and where the weights started. It is written
when everything has been built, so a command that failed before leaves nothing that stands in the next one's way.
"""

import errno
import fcntl
import json
import os
from pathlib import Path
from typing import Any

import torch

from d2s.checkpoint import store as checkpoint
from d2s.checkpoint.restarts import RESTARTS
from d2s.common.files import write_json
from d2s.common.folders import recover
from d2s.training.config import TrainConfig, differences, from_dict, to_dict

CONFIG, LOCK = "config.json", ".lock"
# Left by a command that failed while it was building; neither holds a step of training.
HARMLESS = {LOCK, RESTARTS, "teacher"}
# What may change when a run is resumed: none of these alters a loss.
RESUMABLE = (
    *("log.", "data.loader_workers", "data.damage_budget", "nonfinite_limit"),
    *("engine.zero_stage", "engine.offload_optimizer", "engine.activation_checkpointing"),
)


def check_run(run: Path, config: TrainConfig, origin: dict[str, Any], *, resume: bool) -> Path | None:
    """The checkpoint to resume from, or None for a new run.

    origin: what the run is made from (data, its fingerprint, init).
    Raises ValueError where an earlier run would be written over, or another one resumed.
    """
    if run.exists() and not run.is_dir():
        raise ValueError(f"--run {run} is a file: name a folder")
    if not run.exists() or all(_harmless(path.name) for path in run.iterdir()):
        return None
    if not resume:
        raise ValueError(f"--run {run} is not empty: choose another folder, or add --resume to go on with it")
    saved = read(run)
    changed = [
        name for name in differences(from_dict(saved["config"]), config) if not name.startswith(RESUMABLE)
    ]
    if changed:
        was, now = differences(from_dict(saved["config"]), config)[changed[0]]
        raise ValueError(
            f"--resume: {changed[0]} was {was!r} in {run} and is now {now!r}; keep it, or start a new run"
        )
    for name, now in origin.items():
        if saved.get(name) != now:
            raise ValueError(
                f"--resume: {name} was {saved.get(name)!r} in {run} and is now {now!r}; keep it, or start a new run"
            )
    return checkpoint.newest(run)


def _harmless(name: str) -> bool:
    # A process that was killed leaves the hidden name under which it was writing one of these files.
    return name in HARMLESS or (name.startswith(".") and name.endswith(".tmp"))


def read(run: Path) -> dict[str, Any]:
    """The run's config.json. Raises ValueError, in one line, where there is none or it is not one."""
    path = run / CONFIG
    if not path.is_file():
        raise ValueError(f"{run} holds no run (no {CONFIG}): choose another folder")
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(saved, dict) or not isinstance(saved.get("config"), dict):
        raise ValueError(f"{path} is not a run's configuration: restore it, or choose another folder")
    return saved


def data_of(run: Path) -> str | None:
    """The --data of an earlier run, None where the folder is not a run's."""
    if not (run / CONFIG).is_file():
        return None
    data = read(run).get("data")
    return data if isinstance(data, str) else None


def write(run: Path, config: TrainConfig, origin: dict[str, Any], world: int) -> None:
    """Writes config.json, whole or not at all."""
    content = {"config": to_dict(config), **origin, "workers": world, "torch": torch.__version__}
    write_json(run / CONFIG, content)


def claim(run: Path) -> int:
    """Makes the folder and locks it for this process; returns the lock's file descriptor, to be kept open.

    Raises ValueError where another process is training into it.
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
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP):  # a file system without locks guards nothing
            raise
    recover(run)
    return handle
