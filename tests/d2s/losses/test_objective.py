"""The objective: its scale, and its independence of the number of workers, in float64."""

import dataclasses
import os
from pathlib import Path
from typing import get_args, get_type_hints

import forked
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from d2s.kernels import functional as F
from d2s.losses.objective import LossConfig, Objective
from d2s.losses.table import DISTILLATIONS, LOSSES
from d2s.workers.collectives import all_gather

N, D = 16, 12
EXCHANGES = ("gather", "ring")
CASES = {
    "hinge sum": (LossConfig(align="hinge"), 0.3),
    "hinge max": (LossConfig(align="hinge"), 1.0),
    "infonce": (LossConfig(align="infonce"), 1.0),
    "sigmoid": (LossConfig(align="sigmoid", logit_bias=-3.0), 1.0),
    "cosine": (LossConfig(distill_weight=0.7), 1.0),
    "l1": (LossConfig(distill_weight=0.7, distill="l1"), 1.0),
    "l2": (LossConfig(distill_weight=0.7, distill="l2"), 1.0),
    "relational": (LossConfig(align="infonce", distill_weight=0.7, distill="relational"), 1.0),
}


class _Double(nn.Module):
    """Two linear towers and the objective, in float64."""

    def __init__(self, config: LossConfig) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.image, self.text = nn.Linear(D, D).double(), nn.Linear(D, D).double()
        self.objective = Objective(config).double()

    def forward(self, images: Tensor, texts: Tensor, ids: Tensor, teacher: Tensor, warmup: float) -> Tensor:
        image = nn.functional.normalize(self.image(images), dim=-1)
        text = nn.functional.normalize(self.text(texts), dim=-1)
        return self.objective(image, text, ids, warmup=warmup, teacher=teacher).total


def _problem() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    ids = torch.arange(N) // 2 * 3 % 11  # most images meet twice, some more often
    return torch.randn(N, D).double(), torch.randn(N, D).double(), ids, torch.randn(N, D).double()


def _shares(rank: int, world: int) -> dict[tuple[str, str], tuple[Tensor, list[Tensor]]]:
    """Each case's loss and parameter gradients, reduced as an averaging engine would."""
    rows = slice(rank * N // world, (rank + 1) * N // world)
    results = {}
    cases = [(name, exchange) for name in CASES for exchange in EXCHANGES[: 1 if world == 1 else None]]
    for name, exchange in cases:
        config, warmup = CASES[name]
        module = _Double(dataclasses.replace(config, exchange=exchange))
        loss = module(*(part[rows] for part in _problem()), warmup)
        (loss * world).backward()
        grads = [p.grad.clone() for p in module.parameters()]
        total = loss.detach().clone()
        if world > 1:
            dist.all_reduce(total)
            for grad in grads:
                dist.all_reduce(grad)
                grad /= world
        results[name, exchange] = (total, grads)
    return results


def _ties(rank: int, world: int) -> dict[str, list[Tensor]]:
    """Gradients of images and texts (N, D) of the hinge's hardest negatives where most similarities are equal."""
    rows = slice(rank * N // world, (rank + 1) * N // world)
    found = {}
    for exchange in EXCHANGES:
        draw = torch.Generator().manual_seed(2)
        sides = [torch.eye(3, dtype=torch.float64)[torch.randint(3, (N,), generator=draw)] for _ in range(2)]
        local = [side[rows].requires_grad_() for side in sides]
        ids = torch.cat([torch.zeros(N // 2), torch.arange(N // 2) + 1]).long()[rows]
        Objective(LossConfig(exchange=exchange))(*local, ids).total.backward()
        found[exchange] = [all_gather(side.grad) for side in local]
    return found


def _worker(rank: int, world: int, folder: str) -> None:
    store = dist.FileStore(os.path.join(folder, "store"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    torch.set_num_threads(1)
    results = {"shares": _shares(rank, world), "ties": _ties(rank, world)}
    if rank == 0:
        torch.save(results, os.path.join(folder, "results.pt"))
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)


@pytest.mark.dist
@pytest.mark.parametrize("world", [2, 4])
def test_loss_and_gradients_do_not_depend_on_workers(world: int, tmp_path: Path) -> None:
    forked.context()
    mp.start_processes(_worker, args=(world, str(tmp_path)), nprocs=world, start_method="forkserver")
    results = torch.load(tmp_path / "results.pt")
    shared = results["shares"]
    alone = _shares(0, 1)
    assert len(shared) == len(EXCHANGES) * len(CASES)
    for name, exchange in shared:
        loss, grads = alone[name, "gather"]
        total, others = shared[name, exchange]
        assert torch.allclose(total, loss, rtol=1e-10, atol=0), (name, exchange)
        assert all(own.abs().max() > 1e-3 for own in grads), name
        for own, other in zip(grads, others, strict=True):
            assert (own - other).abs().max() <= 1e-10 * (1 + own.abs().max()), (name, exchange)
    wanted = _ties(0, 1)["gather"]
    assert all(side.any() for side in wanted)
    for exchange, sides in results["ties"].items():
        for own, other in zip(wanted, sides, strict=True):
            assert (own - other).abs().max() <= 1e-10, exchange


def test_every_loss_of_the_table_is_a_choice_of_the_settings_and_a_case_above() -> None:
    choices = get_type_hints(LossConfig)
    assert get_args(choices["align"]) == tuple(LOSSES)
    assert get_args(choices["distill"]) == tuple(DISTILLATIONS)
    configs = [config for config, _ in CASES.values()]
    assert {config.align for config in configs} == LOSSES.keys()
    assert {config.distill for config in configs if config.distill_weight} == DISTILLATIONS.keys()


def test_at_a_batch_of_128_it_is_the_papers_sum_and_mean() -> None:
    torch.manual_seed(0)
    image, text, teacher = (nn.functional.normalize(torch.randn(128, 8), dim=-1) for _ in range(3))
    ids = torch.arange(128)
    loss = Objective(LossConfig(distill_weight=1.0))(image, text, ids, teacher=teacher)
    align = F.hinge_loss(image, text, ids, margin=0.2, hardest=True)
    distill = (1 - (text * teacher).sum(1)).mean()
    assert loss.total.item() == pytest.approx((align + distill).item(), rel=1e-5)


def test_the_ratio_of_the_terms_does_not_depend_on_the_batch() -> None:
    torch.manual_seed(0)
    image, text, teacher = (nn.functional.normalize(torch.randn(32, 8), dim=-1) for _ in range(3))
    config = LossConfig(align="infonce", distill_weight=1.0)
    losses = Objective(config)(image, text, torch.arange(32), teacher=teacher)
    assert losses.total.item() == pytest.approx((128 * losses.align + losses.distill).item() / 32, rel=1e-5)


def test_the_temperature_is_bounded() -> None:
    objective = Objective(LossConfig(align="infonce", logit_scale=99.0))
    nn.init.constant_(objective.log_scale, 50.0)
    assert objective.factors()[0].item() == pytest.approx(100.0)
