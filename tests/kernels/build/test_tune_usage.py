"""What `python -m d2s.kernels.tune` says to mistakes."""

import pytest

pytest.importorskip("triton")

from d2s.kernels.tune import main


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--width", "7"], "--width: invalid choice: 7"),
        (["--kernel", "nonsense"], "--kernel: invalid choice: 'nonsense' (choose from "),
        (["--minutes", "nan"], "--minutes: 'nan' is not a whole number of at least 1"),
        (["--minutes", "-1"], "--minutes: '-1' is not a whole number of at least 1"),
    ],
)
def test_arguments_that_make_no_sense(arguments, said, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["--dry-run", *arguments])
    assert said in capsys.readouterr().err.splitlines()[-1]
