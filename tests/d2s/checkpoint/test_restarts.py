"""Starts in a row that save nothing new are counted."""

from pathlib import Path

import pytest

from d2s.checkpoint.restarts import StalledError, count_start, forget_start


def test_restarts_count_only_where_nothing_new_was_saved(tmp_path: Path) -> None:
    place = tmp_path / "checkpoints" / "step-00000006"
    place.mkdir(parents=True)
    (place / "complete.json").write_text('{"to_validate": true}')
    for _ in range(2):
        count_start(tmp_path, place, 2)
    with pytest.raises(StalledError, match="2 starts in a row began at step-00000006"):
        count_start(tmp_path, place, 2)
    # Its evaluation got done: that is something new.
    (place / "complete.json").write_text('{"to_validate": false}')
    count_start(tmp_path, place, 2)
    forget_start(tmp_path)
    for _ in range(9):
        count_start(tmp_path, place, 0)
