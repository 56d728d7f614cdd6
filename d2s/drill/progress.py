"""Reads the progress of a training from the files in its run folder."""

import contextlib
from pathlib import Path

from d2s.checkpoint.store import newest
from d2s.training.run_log import read_rows


def last_step(run: Path) -> int:
    """Returns the last training step in metrics.jsonl, or 0 if the file has no training step."""
    return max((row["step"] for row in read_rows(run) if row["kind"] == "train"), default=0)


def saved_step(run: Path) -> int:
    """Returns the training step of the newest complete checkpoint, or 0 if there is no complete checkpoint."""
    found = newest(run)
    return int("".join(filter(str.isdigit, found.name))) if found else 0


def finished(run: Path) -> bool:
    """Returns whether the training has written its last model."""
    return (run / "last" / "model.safetensors").is_file()


def incomplete_checkpoints(run: Path) -> dict[str, int]:
    """Maps the name of each checkpoint that was not completely written to its modification time in ns."""
    found = {}
    for path in (run / "checkpoints").glob(".*"):
        with contextlib.suppress(FileNotFoundError):
            found[path.name] = path.stat().st_mtime_ns
    return found


def metrics_version(run: Path) -> tuple[int, int, int]:
    """Returns a value that changes with every write to metrics.jsonl. Returns zeros if the file does not exist."""
    try:
        facts = (run / "metrics.jsonl").stat()
    except FileNotFoundError:
        return (0, 0, 0)
    return facts.st_ino, facts.st_size, facts.st_mtime_ns
