"""One cluster and one small data set for all tests of this folder.

Without SLURM these tests skip, unless D2S_REQUIRE_SLURM is set.
"""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from cluster import Cluster, missing

ROOT = Path(__file__).parents[2]
TRAIN = [
    "scenes_small_pretrain", "--data", "data/scenes", "--engine.zero_stage", "2", "--max_steps", "24",
    "--log.every", "1", "--batch_size", "16", "--data.loader_workers", "0", "--data.max_words_dense", "24",
]  # fmt: skip


def losses(run: Path) -> dict[int, float]:
    """The loss of every step, by metrics.jsonl."""
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: row["loss"] for row in rows if row["kind"] == "train"}


def weights(run: Path) -> bytes:
    """The bytes of the last model."""
    return (run / "last" / "model.safetensors").read_bytes()


def wait_for_step(run: Path, step: int, seconds: float = 150) -> None:
    """Until the run has logged that step."""
    end = time.monotonic() + seconds
    while not ((run / "metrics.jsonl").is_file() and max(losses(run), default=0) >= step):
        assert time.monotonic() < end, f"{run} never came to step {step}"
        time.sleep(0.1)


def ranks(project: Path, job: str | None = None) -> list[psutil.Process]:
    """The processes that train in this project's folder, of all jobs or of one."""
    found = []
    for process in psutil.process_iter():
        try:
            command = process.cmdline()
            if (
                {"d2s.launchers.task", "submitit.core._submit"} & set(command)
                and "python" in Path(command[0]).name
                and process.cwd() == str(project)
                and job in (None, process.environ().get("SLURM_JOB_ID"))
            ):
                found.append(process)
        except psutil.Error:
            continue
    return found


@contextmanager
def paused(project: Path, job: str) -> Iterator[None]:
    """Stops a job's ranks, so that a signal sent in the block comes before their next step. SLURM wakes them."""
    processes = ranks(project, job)
    for process in processes:
        process.suspend()
    try:
        yield
    finally:
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.resume()


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
