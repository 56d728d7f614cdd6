"""Joining the group: devices of their own, exact float32, waiting times, torchrun's own port."""

import os
import subprocess
import sys

import pytest
import torch
from torch import distributed as dist
from worker_cases import build, run, start

from d2s.common.ports import free_port
from d2s.workers.devices import in_full_precision, refuse_shared_devices


@pytest.mark.parametrize("devices", [["cpu"] * 3, ["a GPU 1", "a GPU 2", "b GPU 1"]])
def test_devices_of_their_own(devices):
    refuse_shared_devices(devices)


@pytest.mark.parametrize(
    "devices, said",
    [
        (["a GPU 1", "a GPU 2", "b GPU 1", "a GPU 2"], "ranks 1 and 3 share a GPU 2: start as many workers"),
        (["a GPU 1", "cpu", "cpu"], "rank 1 of 3 sees no GPU, and others do"),
    ],
)
def test_devices_that_cannot_work_together(devices, said):
    with pytest.raises(ValueError, match=said):
        refuse_shared_devices(devices)


def test_float32_is_not_shortened():
    backends = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [backend.allow_tf32 for backend in backends]
    try:
        for backend in backends:
            backend.allow_tf32 = True
        in_full_precision()
        assert not any(backend.allow_tf32 for backend in backends)
    finally:
        for backend, value in zip(backends, before, strict=True):
            backend.allow_tf32 = value


def _waiting() -> dict:
    engine = start(build("pretrain"), 2)
    group = engine.optimizer.dp_process_group
    wait = group._get_backend(torch.device("cpu")).options._timeout
    return {"all": group is dist.group.WORLD, "minutes": wait.total_seconds() / 60}


@pytest.mark.dist
def test_the_engine_waits_as_long_as_everything_else(tmp_path, monkeypatch):
    monkeypatch.setenv("D2S_TIMEOUT", "7")
    found = run(_waiting, 2, tmp_path)
    assert not found["all"], "the start gives its own group the same, and this is about the engine's"
    assert found["minutes"] == 7


ALONE = """
from d2s.workers.collectives import sum_over_workers
from d2s.workers.group import leave, start_workers
import torch
workers = start_workers()
print(workers.rank, workers.world, sum_over_workers(torch.ones(())).item(), flush=True)
leave(0, ordered=True)
"""


@pytest.mark.dist
@pytest.mark.parametrize("rendezvous", ["c10d", "static"])
def test_torchrun_with_a_single_process(rendezvous, tmp_path):
    """torchrun may serve the store itself: its port must be kept."""
    script = tmp_path / "alone.py"
    script.write_text(ALONE)
    place = ["--standalone"] if rendezvous == "c10d" else ["--master_port", str(free_port())]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *place, "--nproc_per_node", "1", str(script)],
        capture_output=True, text=True, timeout=240, env={**os.environ, "D2S_TIMEOUT": "1"}, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout.strip()) == (0, "0 1 1.0"), done.stderr[-2000:]
