"""How far a training is, read from its run folder alone: the training need not help."""

import contextlib
from pathlib import Path

from d2s.checkpoint.store import newest
from d2s.training.run_log import read_rows


def last_step(run: Path) -> int:
    """The last step in metrics.jsonl, 0 if there is none."""
    return max((row["step"] for row in read_rows(run) if row["kind"] == "train"), default=0)


def saved_step(run: Path) -> int:
    """The step of the newest complete checkpoint, 0 if there is none."""
    found = newest(run)
    return int("".join(filter(str.isdigit, found.name))) if found else 0


def finished(run: Path) -> bool:
    """Whether the training has written its last model."""
    return (run / "last" / "model.safetensors").is_file()


def incomplete_checkpoints(run: Path) -> dict[str, int]:
    """Hidden entries of checkpoints/ with their time in ns: being written, or left behind by a kill."""
    found = {}
    for path in (run / "checkpoints").glob(".*"):
        with contextlib.suppress(FileNotFoundError):
            found[path.name] = path.stat().st_mtime_ns
    return found


def metrics_version(run: Path) -> tuple[int, int, int]:
    """A value that changes with every write to metrics.jsonl; zeros if there is none."""
    try:
        facts = (run / "metrics.jsonl").stat()
    except FileNotFoundError:
        return (0, 0, 0)
    return facts.st_ino, facts.st_size, facts.st_mtime_ns
