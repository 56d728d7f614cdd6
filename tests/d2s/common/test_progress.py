"""Progress without a terminal: plain lines, and a summary only if the work was finished."""

import pytest

from d2s.common import progress
from d2s.common.progress import clock, track


def test_clock_rounds_down() -> None:
    assert [clock(s) for s in (0, 59.9, 60, 3599.99, 3600, 36_061)] == [
        "0:00", "0:59", "1:00", "59:59", "1:00:00", "10:01:01"
    ]  # fmt: skip


def test_plain_lines_and_a_summary(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", 0.0)
    assert list(track([(2, "a"), (3, "b")], "shards", 5)) == ["a", "b"]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("shards: 2 of 5, ")
    assert lines[0].endswith(" left")
    assert lines[1].startswith("shards: 5 images in 0:00 (")


def test_no_summary_of_work_that_failed(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> object:
        yield 1, "a"
        raise ValueError("bad image")

    with pytest.raises(ValueError, match="bad image"):
        list(track(fail(), "shards", 2))
    assert capsys.readouterr().err == ""
