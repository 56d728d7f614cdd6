"""One cluster and one small data set for all tests of this folder.

Without SLURM these tests skip, unless D2S_REQUIRE_SLURM is set.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from cluster import Cluster, missing

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Four fake nodes with four GPUs each."""
    if reason := missing():
        # Continuous integration sets it: a run in which these tests were skipped is not green.
        assert not os.environ.get("D2S_REQUIRE_SLURM"), reason
        pytest.skip(reason)
    with Cluster(tmp_path_factory.mktemp("slurm")) as started:
        # All ranks share the machine: one thread each.
        started.environment |= {
            "D2S_ENV": f"venv:{sys.prefix}",
            "D2S_THREADS": "1",
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        # Settings of the tests' own process, which jobs must not inherit.
        for name in ("TRITON_INTERPRET", "PYTEST_CURRENT_TEST"):
            started.environment.pop(name, None)
        yield started


@pytest.fixture(scope="session")
def project(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to call sbatch in, as a clone is: launchers/ and a data set."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "launchers").symlink_to(ROOT / "launchers")
    build = ["-m", "d2s.shard", "build", "--source", "scenes", "--count", "train=400,val=20,test=20"]
    subprocess.run([sys.executable, *build, "--out", "data/scenes"], cwd=folder, check=True, timeout=120)
    return folder
