"""Counts starts without progress, so that a run that the scheduler requeues again and again ends at last.

`restarts.json` in the run folder stores where the last start began, and how many starts in a row began there.
This file needs no torch: train.py imports it before its signal handlers are installed.
"""

from pathlib import Path

from d2s.common.files import file_sha256, read_json, write_json

RESTARTS = "restarts.json"


class StalledError(Exception):
    """Raised if several starts in a row began at the same checkpoint and saved nothing newer."""


def count_start(run: Path, checkpoint: Path | None, limit: int) -> None:
    """Counts a start at `checkpoint` (None: at the first training step). Only one worker calls it.

    Raises StalledError if the last `limit` starts also began there and saved nothing newer; 0 never raises.
    """
    place = {"from": "the beginning", "digest": ""}
    if checkpoint is not None:
        from d2s.checkpoint.store import MARKER

        # The marker is rewritten after validation, which is progress too.
        place = {"from": checkpoint.name, "digest": file_sha256(checkpoint / MARKER)[:16]}
    path = run / RESTARTS
    last = read_json(path) if path.is_file() else {}
    starts = last.pop("starts", 0)
    if last != place:
        starts = 0
    if limit and starts >= limit:
        raise StalledError(
            f"{starts} starts in a row began at {place['from']} and saved nothing after it: the next would not get "
            "further. Save more often (checkpoint.every_steps, checkpoint.every_minutes) or give the job more time, "
            "and resume with --checkpoint.max_stalled_restarts 0"
        )
    write_json(path, {**place, "starts": starts + 1})


def forget_start(run: Path) -> None:
    """Resets the count. Called if the user interrupts the run, because the next start is then no requeue."""
    (run / RESTARTS).unlink(missing_ok=True)
