"""Errors of a command are one line and an exit code."""

from collections.abc import Callable

import pytest

from d2s.common.command import run


def _raise(error: BaseException) -> Callable[[], None]:
    def work() -> None:
        raise error

    return work


@pytest.mark.parametrize(
    "error, code, line",
    [
        (ValueError("two\nlines"), 2, "error: two lines"),
        (FileNotFoundError(2, "No such file or directory", "a.json"), 2, "error: a.json: No such file or directory"),
        (OSError(28, "No space left on device", ".a.tmp", None, "a"), 2, "error: a: No space left on device"),
        (KeyboardInterrupt(), 130, "interrupted; again"),
    ],
)  # fmt: skip
def test_an_error_is_one_line(
    error: BaseException, code: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(_raise(error), interrupted="interrupted; again") == code
    assert capsys.readouterr().err == f"{line}\n"


def test_the_work_gives_the_exit_code() -> None:
    assert run(lambda: None) == 0
    assert run(lambda: 1) == 1
