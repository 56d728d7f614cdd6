"""Doubling the batch less than doubles the memory beyond the gradients: what the system says of a process."""

import os
import subprocess
import sys

import pytest
import torch
from problems import Numbers, contrastive

from d2s.kernels import functional

SIZES = (4096, 8192)
LOSSES = ("hinge_max", "hinge_sum", "info_nce", "sigmoid", "relational", "pointwise")

MEASURE = f"""
import ctypes
from pathlib import Path
import torch
from torch.nn.functional import normalize
from d2s.kernels import functional as F

WIDTH = 64

def memory(field):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024

def loss(name, i, t, ids, teacher, scale, bias):
    if name.startswith("hinge"):
        return F.hinge_loss(i, t, ids, hardest=name == "hinge_max")
    if name == "info_nce":
        return F.info_nce_loss(i, t, ids, scale=scale)
    if name == "sigmoid":
        return F.sigmoid_loss(i, t, ids, scale=scale, bias=bias)
    if name == "relational":
        return F.relational_distillation(i, teacher, t, teacher, temperature=0.1)
    return F.pointwise_distillation(i, teacher)

def extra(name, n):
    torch.manual_seed(0)
    i, t, teacher = (normalize(torch.randn(n, WIDTH), dim=1) for _ in range(3))
    one = [torch.tensor([x], requires_grad=True) for x in (10.0, -5.0)]
    ids = torch.arange(n)
    # Freed memory goes back, and the high-water mark down to what is in use now.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS")
    loss(name, i.requires_grad_(), t.requires_grad_(), ids, teacher, *one).backward()
    gradients = sum(x.grad.nbytes for x in (i, t) if x.grad is not None)
    return memory("VmHWM") - before - gradients

for name in {LOSSES!r}:
    # Libraries' own buffers come with the first call.
    extra(name, 2048)
    print(name, *(extra(name, n) for n in {SIZES!r}))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the high-water mark is read from /proc")
def test_extra_memory_less_than_doubles_with_the_batch():
    done = subprocess.run([sys.executable, "-c", MEASURE], check=True, capture_output=True, text=True)
    rows = [line.split() for line in done.stdout.splitlines()]
    assert tuple(row[0] for row in rows) == LOSSES
    for name, small, large in ((name, int(a), int(b)) for name, a, b in rows):
        dense = SIZES[1] ** 2 * 4
        print(f"{name}: {small / 2**20:.1f} MiB at {SIZES[0]}, {large / 2**20:.1f} MiB at {SIZES[1]}")
        assert large < dense / 4, name
        # A loss without a matrix needs a few MiB, where the system's pages show.
        assert large < 2 * max(small, 4 << 20), name


def on_a_device(name, n):
    """Bytes beyond the gradients at the worst moment of a step: what torch's allocator of the device says."""
    numbers = Numbers(0)
    image, text, teacher = (torch.nn.functional.normalize(numbers.randn(n, 64), dim=1) for _ in range(3))
    image.requires_grad_(), text.requires_grad_()
    ids = torch.arange(n)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    if name == "relational":
        loss = functional.relational_distillation(image, teacher, text, teacher, temperature=0.1)
    elif name == "pointwise":
        loss = functional.pointwise_distillation(image, teacher)
    else:
        loss = contrastive(functional, name, image, text, ids)
    loss.backward()
    gradients = sum(x.grad.nbytes for x in (image, text) if x.grad is not None)
    return torch.cuda.max_memory_allocated() - before - gradients


@pytest.mark.gpu
@pytest.mark.skipif(os.environ.get("D2S_TEST_DEVICE", "cpu") != "cuda", reason="no device is tested")
@pytest.mark.parametrize("name", LOSSES)
def test_extra_memory_on_a_device_less_than_doubles_with_the_batch(name):
    # Libraries' own buffers come with the first call. From 16,384 rows on blocks of 64 MiB are full.
    on_a_device(name, 2048)
    small, large = on_a_device(name, 16384), on_a_device(name, 32768)
    print(f"{name}: {small / 2**20:.1f} MiB at 16384, {large / 2**20:.1f} MiB at 32768")
    assert large < 32768**2 * 4 / 16
    assert large < 2 * max(small, 4 << 20)
