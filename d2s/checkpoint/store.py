"""Checkpoints: complete or invisible, newest intact one found by itself, for any number of workers and ZeRO stage.

    checkpoints/step-00000120/    worker-00000.safetensors, one for each worker that wrote, then `complete.json`,
                                  the marker, with the run's state and the sha256 of every file
    checkpoints/.step-00000120/   being written, or left behind by a killed process; never read
    best/, last/                  D2SModel folders (safetensors), for use and evaluation

A checkpoint is written under a hidden name, flushed to disk, marked and renamed; only then are old ones removed.
Weights, AdamW's moments and buffers stand in it by name, each worker's part of them in its own file
(:mod:`d2s.checkpoint.zero_state`), so no worker ever holds or writes more than its part. Nothing in it is a pickle.
"""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from d2s.checkpoint.worker_file import Shares, own_share, write_share
from d2s.checkpoint.zero_state import ZeroState
from d2s.common.files import file_sha256, sync_folder, write_json
from d2s.common.folders import discard, put_in_place, recover
from d2s.model.running_statistics import broadcast_running_statistics
from d2s.workers.collectives import run_on_all
from d2s.workers.group import Workers

MARKER = "complete.json"
STATE = {"step", "to_validate", "best", "damaged", "truncated", "skipped"}
_OURS = {"files", "optimizer_steps"}


def newest(run: Path) -> Path | None:
    """The newest complete checkpoint of a run, or None. Whether it is intact is not looked at."""
    return max(_complete(run / "checkpoints"), key=_step, default=None)


def _complete(folder: Path) -> list[Path]:
    # One set aside by a process that did not live to put another in its place counts until it is brought back.
    aside = [path for path in folder.glob(".step-*.old") if not path.with_name(path.name[1:-4]).exists()]
    named = [path for path in [*folder.glob("step-*"), *aside] if _number(path).isdigit()]
    return [path for path in named if (path / MARKER).is_file()]


def _number(path: Path) -> str:
    return path.name.removeprefix(".").removesuffix(".old").removeprefix("step-")


def _step(path: Path) -> int:
    return int(_number(path))


def save(run: Path, step: int, state: dict[str, Any], engine: Any, workers: Workers, *, keep: int) -> None:
    """Writes checkpoint `step` of a run, on all workers together, and keeps the newest `keep`.

    Running statistics that workers compute apart become the first worker's on all of them: one model is saved.

    state: JSON-serialisable, with the keys of `STATE`. Raises ValueError in one line, on all workers, where the disk
    of any of them does not take it; older checkpoints are then as they were.
    """
    final = run / "checkpoints" / f"step-{step:08d}"
    hidden = final.with_name(f".{final.name}")
    name = f"worker-{workers.rank:05d}.safetensors"
    engine_state = ZeroState(engine)
    broadcast_running_statistics(engine.module)

    def prepare() -> None:
        if workers.is_main:
            shutil.rmtree(hidden, ignore_errors=True)
            hidden.mkdir(parents=True)

    def write() -> tuple[str, str]:
        pieces = own_share(engine_state.pieces(), workers.rank, workers.world)
        return name, write_share(hidden / name, pieces)

    def finish() -> None:
        if workers.is_main:
            marker = {**state, "files": dict(files), "optimizer_steps": engine_state.steps}
            write_json(hidden / MARKER, marker)
            sync_folder(hidden)
            put_in_place(hidden, final)
            _prune(final, keep)

    try:
        run_on_all(prepare)
        files = run_on_all(write)
        run_on_all(finish)
    except ValueError as error:
        if workers.is_main:
            shutil.rmtree(hidden, ignore_errors=True)  # it may be what fills the disk
        older = newest(run)
        rest = f"then --resume goes on from {older.name}" if older else "there is no older one to go on from"
        raise ValueError(
            f"checkpoint {final} could not be written ({error}): make room or mend it; {rest}"
        ) from None


def update(run: Path, step: int, state: dict[str, Any], *, is_main: bool) -> None:
    """Replaces the state of a complete checkpoint, everything else in it staying as it is; all call it together.

    Raises ValueError in one line, on all workers, where the disk does not take it.
    """
    path = run / "checkpoints" / f"step-{step:08d}" / MARKER

    def write() -> None:
        if is_main:
            marker = json.loads(path.read_text(encoding="utf-8"))
            write_json(path, {**state, **{key: marker[key] for key in _OURS}})

    try:
        run_on_all(write)
    except ValueError as error:
        raise ValueError(
            f"{path} could not be written ({error}): make room or mend it, then --resume"
        ) from None


def load(run: Path, engine: Any, workers: Workers) -> dict[str, Any] | None:
    """Restores the engine, on all workers together, from the newest intact checkpoint, and returns its state.

    None where there is no checkpoint. A damaged one is passed over, with a line that names it, the file and the
    remedy; raises ValueError where all of them are damaged.
    """

    def choose() -> list[Path]:
        if workers.is_main:
            recover(run / "checkpoints")
            return sorted(_complete(run / "checkpoints"), key=_step, reverse=True)
        return []

    candidates = run_on_all(choose)[0]
    for number, folder in enumerate(candidates):
        state, problems = _try(folder, engine, workers)
        if not problems:
            return state
        older = [path.name for path in candidates[number + 1 :]]
        line = f"checkpoint {folder} is damaged ({problems[0]})"
        if not older:
            raise ValueError(f"{line}, and there is no older one: remove checkpoints/ to begin anew")
        if workers.is_main:
            print(f"{line}: going on from {older[0]} instead", file=sys.stderr, flush=True)
    return None


def _try(folder: Path, engine: Any, workers: Workers) -> tuple[dict[str, Any], list[str]]:
    """State of the checkpoint, and what any worker finds wrong with it; the engine is filled only if nothing is."""
    state: dict[str, Any] = {}

    def attempt(action: Callable[[], None]) -> list[str]:
        problem = ""
        try:
            action()
        except (ValueError, OSError, SafetensorError) as error:
            problem = " ".join(str(error).split())
        return [told for told in run_on_all(lambda: problem) if told]

    def verify() -> None:
        state.update(_read_marker(folder))
        for number, (name, digest) in enumerate(sorted(state["files"].items())):
            # Each file is read by one worker; what it finds all learn.
            if number % workers.world == workers.rank and file_sha256(folder / name) != digest:
                raise ValueError(f"{name} differs from its checksum")

    def fill() -> None:
        engine_state = ZeroState(engine)
        with Shares(folder / name for name in sorted(state["files"])) as shares:
            _compare(shares.sizes(), engine_state.sizes())
            for piece in engine_state.pieces():
                shares.fill(piece)

    problems = attempt(verify) or attempt(fill)
    if not problems:
        ZeroState(engine).restored(state["optimizer_steps"])
    return state, problems


def _read_marker(folder: Path) -> dict[str, Any]:
    marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
    if not isinstance(marker, dict) or not marker.keys() >= STATE | _OURS:
        raise ValueError(f"{MARKER} lacks some of {', '.join(sorted(STATE | _OURS))}")
    files = marker["files"]
    if not isinstance(files, dict) or not all(Path(name).name == name for name in files):
        raise ValueError(f"{MARKER} names files outside of its folder")
    return marker


def _compare(saved: dict[str, int], wanted: dict[str, int]) -> None:
    for name in sorted(saved.keys() | wanted.keys()):
        if saved.get(name, 0) != wanted.get(name, 0):
            raise ValueError(
                f"it holds {saved.get(name, 0)} numbers of {name}, the model {wanted.get(name, 0)}"
            )


def _prune(final: Path, keep: int) -> None:
    """Removes what is older than the newest `keep`, and what is newer: that was passed over as damaged."""
    folder = final.parent
    complete = sorted(_complete(folder), key=_step)
    past = [path for path in complete if _step(path) <= _step(final)]
    others = [path for path in folder.glob("step-*") if _number(path).isdigit()]
    left = [path for path in [*others, *folder.glob(".step-*")] if path not in complete]
    for path in [*past[:-keep], *complete[len(past) :], *left]:
        discard(path)
