"""What is no number shows in the loss, also where maxima leave it out as a device's do."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from contrast import ours, problem, rows_of
from problems import CONTRASTIVE

from d2s.kernels.fused.launch import INTERPRETED


@pytest.fixture(autouse=True)
def maxima_of_a_device(monkeypatch):
    """The interpreter's maximum keeps NaN where the compiled one gives the other operand."""
    if INTERPRETED:
        from triton.runtime.interpreter import InterpreterBuilder

        for name, of_two in (("create_maxnumf", np.fmax), ("create_minnumf", np.fmin)):
            monkeypatch.setattr(
                InterpreterBuilder, name, lambda self, a, b, of_two=of_two: self.binary_op(a, b, of_two)
            )


@pytest.mark.parametrize("part", [False, True])
@pytest.mark.parametrize("name", CONTRASTIVE)
def test_an_embedding(name, part):
    p = problem(70, 8, 60)
    p.image[20, 3] = math.nan
    assert ours(name, rows_of(p, 8, 40) if part else p)[0].isnan()


@pytest.mark.parametrize("name", ["info_nce", "sigmoid"])
def test_the_scale(name):
    p = replace(problem(20, 8, 20), scale=torch.tensor([math.nan]))
    loss, *gradients = ours(name, p)
    assert loss.isnan()
    assert all(g.isnan().all() for g in gradients[:2])
