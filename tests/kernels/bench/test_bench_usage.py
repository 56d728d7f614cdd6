"""What `python -m d2s.kernels.bench` says to mistakes, before it measures anything."""

import os
import subprocess
import sys

import pytest

from d2s.kernels.bench import record
from d2s.kernels.bench.__main__ import main

TINY = ["--device", "cpu", "--size", "tiny", "--only", "pointwise", "--repeat", "1", "--provider", "ours"]


def last_line(arguments, capsys):
    try:
        code = main(arguments)
    except SystemExit as error:
        code = error.code
    return code, capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--device", "tpu"], "--device: 'tpu' is not cpu"),
        (["--n", "-5"], "--n: '-5' is not a whole number of at least 1"),
        (["--n", "0"], "--n: '0' is not a whole number of at least 1"),
        (["--repeat", "0"], "--repeat: '0' is not a whole number of at least 1"),
        (["--size", "tiny", "--n", "9"], "--n: --size tiny has sizes of its own"),
    ],
)
def test_arguments_that_make_no_sense(arguments, said, capsys):
    code, line = last_line(arguments, capsys)
    assert code == 2
    assert said in line


def foreign(path):
    path.write_text("date,device\n1,2\n", encoding="utf-8")


def binary(path):
    path.write_bytes(b"\xff\xfe")


@pytest.mark.parametrize(
    "spoil, said",
    [
        (foreign, "has other columns"),
        (binary, "has other columns"),
        (lambda path: path.mkdir(), "Is a directory"),
    ],
)
def test_a_file_that_nothing_can_be_added_to_is_named_and_left_as_it_is(spoil, said, tmp_path, capsys):
    path = record.file_of(tmp_path, record.device_name("cpu"))
    spoil(path)
    before = path.read_bytes() if path.is_file() else None
    code, line = last_line([*TINY, "--out", str(tmp_path)], capsys)
    assert code == 2
    assert said in line
    assert str(path) in line
    assert (path.read_bytes() if path.is_file() else None) == before


def test_a_folder_that_is_a_file(tmp_path, capsys):
    (tmp_path / "file").write_text("", encoding="utf-8")
    code, line = last_line([*TINY, "--out", str(tmp_path / "file")], capsys)
    assert code == 2
    assert "File exists" in line


@pytest.mark.slow
def test_nothing_measured_is_a_failure(tmp_path):
    environment = {**os.environ, "D2S_KERNELS": "bogus"}
    done = subprocess.run(
        [sys.executable, "-m", "d2s.kernels.bench", *TINY, "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        timeout=120,
    )
    assert done.returncode == 1
    assert done.stderr.strip().endswith("nothing was measured of ours")
    assert "bogus" in done.stdout
    assert not [*tmp_path.iterdir()]
