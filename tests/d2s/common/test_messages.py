from pathlib import Path

import pytest

from d2s.common.command import Parser, positive, run
from d2s.common.messages import LIMIT, LINE_LIMIT, one_line, shorten


def test_both_ends_of_a_long_text_remain() -> None:
    assert shorten("short") == "short"
    text = shorten(f"field 'image' is {'x' * 775_514}, not text")
    assert len(text) <= LIMIT
    assert text.startswith("field 'image' is xxx")
    assert text.endswith("x, not text")
    assert "(775,541 characters)" in text
    assert one_line("two\n lines") == "two lines"
    line = one_line(f"--n: '{'a b ' * 1000}' is no number")
    assert len(line) <= LIMIT + 20
    assert line.endswith("b ' is no number")
    assert len(one_line("a b\n" * 10_000_000)) <= LINE_LIMIT


def test_an_error_of_a_command_is_bounded(capsys: pytest.CaptureFixture) -> None:
    def fail() -> None:
        raise ValueError("x" * 10_000)

    def fail_to_read() -> None:
        Path("y" * 10_000).read_text()

    assert run(fail) == run(fail_to_read) == 2
    with pytest.raises(SystemExit):
        Parser(prog="p").parse_args(["z" * 10_000])
    parser = Parser(prog="p")
    parser.add_argument("--n", type=positive)
    with pytest.raises(SystemExit):
        parser.parse_args(["--n", "w" * 10_000])
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4
    assert all(line.startswith("error: ") and len(line) < LIMIT + 100 for line in lines)
