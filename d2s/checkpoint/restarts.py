"""Counts starts of a run without progress. If there are too many, the run ends with an error.

`restarts.json` in the run folder stores the checkpoint of the last start, and how many starts in a row began
at this checkpoint. This module imports no torch, so that train.py can install its signal handlers early.
"""

from pathlib import Path

from d2s.common.files import file_sha256, read_json, write_json

RESTARTS = "restarts.json"


class StalledError(Exception):
    """Says that several starts in a row began at the same checkpoint and saved nothing newer."""


def count_start(run: Path, checkpoint: Path | None, limit: int) -> None:
    """Counts a start at `checkpoint`, or at the first training step if None. Only one worker calls this.

    Raises StalledError if the last `limit` starts began at the same checkpoint. 0 means no limit.
    """
    place = {"from": "the beginning", "digest": ""}
    if checkpoint is not None:
        from d2s.checkpoint.store import MARKER

        # Validation rewrites the marker. So a finished validation also counts as progress.
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
    """Resets the count. Call it if the user stops a run, because the user will start the next one."""
    (run / RESTARTS).unlink(missing_ok=True)
