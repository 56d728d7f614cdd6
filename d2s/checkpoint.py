"""Checkpoints: complete or invisible, newest complete one found by itself.

    checkpoints/step-00000120/    the engine's own files, then `complete.json`, the marker, written last
    checkpoints/.step-00000120/   being written, or left behind by a killed process; never read
    best/, last/                  D2SModel folders (safetensors), for use and evaluation

A checkpoint is written under a hidden name, synced to disk, marked, and renamed; only then are old ones removed.
"""

import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from d2s.shards.files import write_json

MARKER = "complete.json"
STATE = {"step", "to_validate", "best", "damaged", "truncated", "skipped"}
_TAG = "engine"


def fsync_tree(folder: Path) -> None:
    """Flushes every file below `folder`, and the folders themselves, to disk."""
    for root, _, files in os.walk(folder):
        for name in [*files, "."]:
            handle = os.open(os.path.join(root, name), os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)


def replace_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Fills a new folder with `write` and puts it in the place of `folder`."""
    fresh, old = folder.with_name(f".{folder.name}.new"), folder.with_name(f".{folder.name}.old")
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)
    fresh.mkdir(parents=True)
    write(fresh)
    fsync_tree(fresh)
    if folder.exists():
        folder.rename(old)
    fresh.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def newest(run: Path) -> Path | None:
    """The newest complete checkpoint of a run, or None."""
    return max(
        (path for path in _steps(run / "checkpoints") if (path / MARKER).is_file()), key=_step, default=None
    )


def _steps(folder: Path) -> list[Path]:
    return [path for path in folder.glob("step-*") if path.name.removeprefix("step-").isdigit()]


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def save(run: Path, step: int, state: dict, save_engine: Callable[..., object], *, is_main: bool,
         barrier: Callable[[], None], keep: int) -> None:  # fmt: skip
    """Writes checkpoint `step` of a run, on all workers together, and keeps the newest `keep`.

    state: JSON-serialisable; save_engine(folder, tag=...): writes this worker's share of the engine.
    """
    final = run / "checkpoints" / f"step-{step:08d}"
    hidden = final.with_name(f".{final.name}")
    if is_main:
        shutil.rmtree(hidden, ignore_errors=True)
        hidden.mkdir(parents=True)
    barrier()
    save_engine(str(hidden), tag=_TAG)
    barrier()
    if is_main:
        fsync_tree(hidden)
        write_json(hidden / MARKER, state)
        shutil.rmtree(final, ignore_errors=True)
        hidden.rename(final)
        _prune(final.parent, keep)
    barrier()


def update(run: Path, step: int, state: dict) -> None:
    """Replaces the state of a complete checkpoint, the engine's files staying as they are."""
    write_json(run / "checkpoints" / f"step-{step:08d}" / MARKER, state)


def load(checkpoint: Path, load_engine: Callable[..., object]) -> dict:
    """Restores the engine from a complete checkpoint and returns its state.

    Pickles are read with torch's restricted unpickler, which admits tensors, containers and the few classes that
    the engine itself writes. Raises ValueError, in one line, where files are damaged, missing or hold anything else.
    """
    remedy = "remove this folder to go on from an older one"
    try:
        state = json.loads((checkpoint / MARKER).read_text(encoding="utf-8"))
        if not isinstance(state, dict) or not state.keys() >= STATE:
            raise ValueError(f"{MARKER} lacks some of {', '.join(sorted(STATE))}")
        with _restricted_unpickling():
            path, _ = load_engine(str(checkpoint), tag=_TAG)
        if path is None:
            raise ValueError("the engine's files are missing")
    except (
        ValueError,
        OSError,
        RuntimeError,
        EOFError,
        AssertionError,
        KeyError,
        pickle.UnpicklingError,
    ) as error:
        raise ValueError(f"{checkpoint} is damaged ({str(error).splitlines()[0]}): {remedy}") from error
    return state


@contextmanager
def _restricted_unpickling() -> Iterator[None]:
    """DeepSpeed asks torch.load for the unrestricted unpickler, which runs whatever code a file names."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        with torch.serialization.safe_globals(
            [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]
        ):
            yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _prune(folder: Path, keep: int) -> None:
    steps = sorted(_steps(folder), key=_step)
    for path in [*steps[:-keep], *folder.glob(".step-*")]:
        shutil.rmtree(path, ignore_errors=True)
