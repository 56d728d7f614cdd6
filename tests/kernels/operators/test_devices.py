"""What every test here must keep to, so that D2S_TEST_DEVICE=cuda can run it on a device; shown without one."""

import re
from importlib import import_module
from pathlib import Path

import torch
from problems import Numbers

HERE = Path(__file__).parents[1]


def wrong_in(path):
    """What a file does that a device would not have: one line a fault; none where all its tests are on the CPU."""
    module = import_module(path.stem)
    marks = getattr(module, "pytestmark", [])
    if "on_cpu" in [mark.name for mark in (marks if isinstance(marks, list) else [marks])]:
        return
    if re.search(r"torch\.Generator|generator=", path.read_text(encoding="utf-8")):
        yield f"{path.name}: a generator; use problems.Numbers"
    for name, value in vars(module).items():
        if isinstance(value, torch.Tensor):
            yield f"{path.name}: {name} is made before a test runs"


def test_no_file_makes_a_generator_or_a_tensor_before_a_test_runs(files_on_cpu, monkeypatch):
    """A generator of the CPU makes nothing on a device, and what a module makes on import lies on the CPU."""
    for folder in {path.parent for path in HERE.rglob("test_*.py")}:
        monkeypatch.syspath_prepend(folder)
    rest = {
        path for path in HERE.rglob("*.py") if path.name not in {*files_on_cpu, "conftest.py", "problems.py"}
    }
    assert len(rest) > 10
    assert [fault for path in sorted(rest) for fault in wrong_in(path)] == []


def test_numbers_are_made_where_tensors_are_made_and_are_the_same_everywhere():
    here = Numbers(3)
    expected = here.randn(2, 3), here.rand(4), here.randint(9, (5,)), here.randperm(6)
    with torch.device("meta"):
        there = Numbers(3)
        drawn = there.randn(2, 3), there.rand(4), there.randint(9, (5,)), there.randperm(6)
    assert all(
        x.is_meta and x.shape == y.shape and x.dtype == y.dtype for x, y in zip(drawn, expected, strict=True)
    )
    again = torch.Generator().manual_seed(3)
    assert torch.equal(expected[0], torch.randn(2, 3, generator=again))
    assert torch.equal(expected[1], torch.rand(4, generator=again))
