"""Saves and loads the checkpoints of a run, for any number of workers and any ZeRO stage.

    checkpoints/step-00000120/    complete: one file for each worker (worker-00000.safetensors, ...), and the
                                  marker `complete.json` with the run's state and the sha256 of every file
    checkpoints/.step-00000120/   unfinished: being written, or left by a killed process. It is never read.
    best/, last/                  D2SModel folders (safetensors), for use and evaluation

A checkpoint is written under a hidden name, flushed to disk, marked as complete and renamed. Then old
checkpoints are removed. A checkpoint contains weights, AdamW's moments and buffers by name. No worker needs
all of them, because each worker writes a part (:mod:`d2s.checkpoint.zero_state`). No file is a pickle.
"""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from d2s.checkpoint.worker_file import WorkerFiles, slices_to_write, write_slices
from d2s.checkpoint.zero_state import ZeroState
from d2s.common.files import file_sha256, sync_path, write_json
from d2s.common.folders import discard, put_in_place, recover
from d2s.model.running_statistics import broadcast_running_statistics
from d2s.workers.collectives import run_on_all
from d2s.workers.group import Workers

MARKER = "complete.json"
STATE = {"step", "to_validate", "best", "damaged", "truncated", "skipped"}
_CONTENT = {"files", "optimizer_steps"}


def newest(run: Path) -> Path | None:
    """Returns the newest complete checkpoint of a run, or None. Does not check whether it is damaged."""
    return max(_complete(run / "checkpoints"), key=_step, default=None)


def _folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


def _complete(folder: Path) -> list[Path]:
    """Returns all complete checkpoints, also `.step-*.old` folders that no new checkpoint has replaced."""
    aside = [path for path in folder.glob(".step-*.old") if not path.with_name(path.name[1:-4]).exists()]
    named = [path for path in [*folder.glob("step-*"), *aside] if _number(path).isdigit()]
    return [path for path in named if (path / MARKER).is_file()]


def _number(path: Path) -> str:
    return path.name.removeprefix(".").removesuffix(".old").removeprefix("step-")


def _step(path: Path) -> int:
    return int(_number(path))


def save(run: Path, step: int, state: dict[str, Any], engine: Any, workers: Workers, *, keep: int) -> None:
    """Writes checkpoint `step`, then removes all but the newest `keep`. All workers must call this together.

    All workers get the running statistics of worker 0.
    state: JSON values under the keys in `STATE`.
    Raises ValueError on all workers if any worker cannot write. Older checkpoints then stay unchanged.
    """
    final = _folder(run, step)
    hidden = final.with_name(f".{final.name}")
    name = f"worker-{workers.rank:05d}.safetensors"
    engine_state = ZeroState(engine)
    broadcast_running_statistics(engine.module)

    def prepare() -> None:
        if workers.is_main:
            shutil.rmtree(hidden, ignore_errors=True)
            hidden.mkdir(parents=True)

    def write() -> tuple[str, str]:
        slices = slices_to_write(engine_state.slices(), workers.rank, workers.world)
        return name, write_slices(hidden / name, slices)

    def finish() -> None:
        if workers.is_main:
            marker = {**state, "files": dict(files), "optimizer_steps": engine_state.steps}
            write_json(hidden / MARKER, marker)
            sync_path(hidden)
            put_in_place(hidden, final)
            _prune(final, keep)

    try:
        run_on_all(prepare)
        files = run_on_all(write)
        run_on_all(finish)
    except ValueError as error:
        if workers.is_main:
            shutil.rmtree(hidden, ignore_errors=True)  # frees the disk, which may be full
        older = newest(run)
        next_start = (
            f"then --resume goes on from {older.name}" if older else "there is no older one to resume"
        )
        raise ValueError(
            f"checkpoint {final} could not be written ({error}): make room or mend it; {next_start}"
        ) from None


def update(run: Path, step: int, state: dict[str, Any], *, is_main: bool) -> None:
    """Replaces the run's state in a complete checkpoint. All workers must call this together.

    state: as in `save`. Raises ValueError on all workers if the state cannot be written.
    """
    path = _folder(run, step) / MARKER

    def write() -> None:
        if is_main:
            marker = json.loads(path.read_text(encoding="utf-8"))
            write_json(path, {**state, **{key: marker[key] for key in _CONTENT}})

    try:
        run_on_all(write)
    except ValueError as error:
        raise ValueError(
            f"{path} could not be written ({error}): make room or mend it, then --resume"
        ) from None


def load(run: Path, engine: Any, workers: Workers) -> dict[str, Any] | None:
    """Restores the newest intact checkpoint. All workers must call this together.

    Returns the `state` that was given to `save`, or None if there is no checkpoint. Skips damaged checkpoints
    and prints a line to stderr for each. Raises ValueError if all checkpoints are damaged.
    """

    def choose() -> list[Path]:
        if workers.is_main:
            recover(run / "checkpoints")
            return sorted(_complete(run / "checkpoints"), key=_step, reverse=True)
        return []

    candidates = run_on_all(choose)[0]
    for number, folder in enumerate(candidates):
        state, problems = _try_load(folder, engine, workers)
        if not problems:
            return state
        older = [path.name for path in candidates[number + 1 :]]
        line = f"checkpoint {folder} is damaged ({problems[0]})"
        if not older:
            raise ValueError(f"{line}, and there is no older one: remove checkpoints/ to begin anew")
        if workers.is_main:
            print(f"{line}: going on from {older[0]} instead", file=sys.stderr, flush=True)
    return None


def _try_load(folder: Path, engine: Any, workers: Workers) -> tuple[dict[str, Any], list[str]]:
    """Verifies a checkpoint and restores it. Returns (saved state, error messages of all workers).

    If there is a problem, the state may be incomplete. If a file is damaged, the engine stays unchanged.
    """
    state: dict[str, Any] = {}

    def problems_of(action: Callable[[], None]) -> list[str]:
        problem = ""
        try:
            action()
        except (ValueError, OSError, SafetensorError) as error:
            problem = " ".join(str(error).split())
        return [found for found in run_on_all(lambda: problem) if found]

    def verify() -> None:
        state.update(json.loads((folder / MARKER).read_text(encoding="utf-8")))
        if not state.keys() >= STATE | _CONTENT:
            raise ValueError(f"{MARKER} lacks some of {', '.join(sorted(STATE | _CONTENT))}")
        for number, (name, digest) in enumerate(sorted(state["files"].items())):
            # Each worker checks a part of the files. `run_on_all` shares the results.
            if number % workers.world == workers.rank and file_sha256(folder / name) != digest:
                raise ValueError(f"{name} differs from its checksum")

    def fill() -> None:
        engine_state = ZeroState(engine)
        with WorkerFiles(folder / name for name in sorted(state["files"])) as files:
            saved, wanted = files.element_counts(), engine_state.element_counts()
            for tensor in sorted(saved.keys() | wanted.keys()):
                if (found := saved.get(tensor, 0)) != (needed := wanted.get(tensor, 0)):
                    raise ValueError(f"it holds {found} numbers of {tensor}, the model {needed}")
            for target in engine_state.slices():
                files.read_into(target)

    problems = problems_of(verify) or problems_of(fill)
    if not problems:
        ZeroState(engine).finish_restore(state["optimizer_steps"])
    return state, problems


def _prune(final: Path, keep: int) -> None:
    """Keeps `final` and the `keep` - 1 checkpoints before it. Removes all others: later ones are damaged."""
    folder = final.parent
    complete = sorted(_complete(folder), key=_step)
    up_to_final = [path for path in complete if _step(path) <= _step(final)]
    numbered = [path for path in folder.glob("step-*") if _number(path).isdigit()]
    incomplete = [path for path in [*numbered, *folder.glob(".step-*")] if path not in complete]
    for path in [*up_to_final[:-keep], *complete[len(up_to_final) :], *incomplete]:
        discard(path)
