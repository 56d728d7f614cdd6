"""Data sets for the tests of the shards."""

from collections.abc import Callable
from pathlib import Path

import pytest
from shard_sources import Karpathy

from d2s.shards.cli import main


@pytest.fixture
def karpathy(tmp_path: Path) -> Karpathy:
    """Ten photos for training, three for validation, two for the test."""
    return Karpathy(tmp_path / "source", {"train": 10, "val": 3, "test": 2})


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set that is built once. Only for reading."""
    root = tmp_path_factory.mktemp("dataset")
    assert Karpathy(root / "source", {"train": 10, "val": 3, "test": 2}).build(root / "out") == 0
    return root / "out"


@pytest.fixture
def refused(capsys: pytest.CaptureFixture) -> Callable[..., str]:
    """Runs a command that has to end with code 2 and one line; returns the line."""

    def run(arguments: list[str]) -> str:
        capsys.readouterr()
        assert main(arguments) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1, lines
        assert lines[0].startswith("error: ")
        return lines[0]

    return run
