"""Losses, gradients and weights do not depend on the number of workers, nor on what ZeRO divides among them."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from worker_cases import CASES, all_cases, build, gradients, losses_and_backward, pairs, run, set_case, start

SIZE = 3  # pairs in a micro-batch; it divides no worker's share


def _alone() -> dict[tuple[str, str], tuple[Tensor, dict[str, Tensor]]]:
    """Loss and gradients of every case in one process, by torch alone, all pairs at once."""
    found = {}
    batch, teacher = pairs()
    for stage, name in all_cases():
        module = build(stage)
        warmup = set_case(module, stage, name)
        total = module(batch, warmup, teacher)[0]
        total.backward()
        grads = {k: torch.zeros_like(p) if p.grad is None else p.grad for k, p in module.named_parameters()}
        found[stage, name] = (total.detach(), grads)
    return found


def _through_engines(stages: tuple[int, ...]) -> dict:
    """The same through the engine, for some ZeRO stages, at once and by micro-batches; and weights after steps."""
    found = {}
    for zero in stages:
        for stage, cases in CASES.items():
            engine = start(build(stage), zero)
            for name in cases:
                for size in (0, SIZE):
                    total = losses_and_backward(engine, stage, name, size)
                    found[zero, stage, name, size] = (total, gradients(engine.module))
                    engine.step()  # at a learning rate of 0
    return found


@pytest.mark.dist
@pytest.mark.parametrize("world, stages", [(1, (0,)), (2, (0, 1, 2, 3)), (4, (0, 3))])
def test_gradients_through_the_engine(world: int, stages: tuple[int, ...], tmp_path: Path) -> None:
    found = run(_through_engines, world, tmp_path, stages)
    alone = _alone()
    assert len(found) == len(stages) * 2 * len(alone)
    for (zero, stage, name, size), (total, grads) in found.items():
        where = f"ZeRO {zero}, {stage}, {name}, micro-batches of {size}"
        wanted, wanted_grads = alone[stage, name]
        assert torch.allclose(total, wanted, rtol=1e-5, atol=0), where
        assert grads.keys() == wanted_grads.keys()
        for key, own in wanted_grads.items():
            apart = (grads[key] - own).abs().max()
            assert apart <= 1e-5 * max(1.0, own.abs().max()), f"{where}, {key}: {apart}"
