"""Trainings that run as jobs: their command, their progress and their processes."""

import contextlib
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

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
