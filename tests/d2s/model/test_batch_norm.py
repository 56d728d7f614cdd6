"""BatchNorm over real words only, and over all workers."""

import os
import tempfile

import pytest
import torch
from torch import distributed as dist
from torch import multiprocessing, nn

from d2s.model.batch_norm import MapBatchNorm, WordBatchNorm, share_statistics


def test_equals_torch_on_one_worker():
    torch.manual_seed(0)
    ours, theirs = WordBatchNorm(5).double(), nn.BatchNorm1d(5).double()
    values = torch.randn(30, 5, dtype=torch.float64) * 3 + 1
    target = torch.randn(30, 5, dtype=torch.float64)
    grads = []
    for norm in (ours, theirs):
        x = values.clone().requires_grad_()
        out = norm(x)
        (out * target).sum().backward()
        grads.append((out.detach(), x.grad, norm.weight.grad, norm.bias.grad))
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=0)
    for name, buffer in theirs.named_buffers():
        torch.testing.assert_close(ours.get_buffer(name), buffer)
    torch.testing.assert_close(ours.eval()(values), theirs.eval()(values))


def test_every_map_norm_is_exchanged():
    model = share_statistics(nn.Sequential(nn.BatchNorm2d(3), nn.Sequential(nn.BatchNorm2d(3))))
    assert [type(norm) for norm in (model[0], model[1][0])] == [MapBatchNorm] * 2


def _batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    draw = {"generator": generator, "dtype": torch.float64}
    return torch.randn(12, 4, 3, 3, **draw), torch.randn(12, 4, 3, 3, **draw)


def _pass(values: torch.Tensor, target: torch.Tensor, kind: str) -> list[torch.Tensor]:
    """Output, gradients and running statistics of one training pass, and of a loss that is a sum."""
    torch.manual_seed(0)
    norm = (MapBatchNorm if kind == "map" else WordBatchNorm)(4).double()
    nn.init.uniform_(norm.weight)
    x = values.clone().requires_grad_()
    flat = x if kind == "map" else x.movedim(1, 3).flatten(0, 2)
    goal = target if kind == "map" else target.movedim(1, 3).flatten(0, 2)
    out = norm(flat)
    (out * goal).sum().backward()
    return [x.grad, norm.weight.grad, norm.bias.grad, norm.running_mean, norm.running_var]


def _worker(rank: int, world: int, address: str, folder: str) -> None:
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=world)
    values, target = _batch()
    # Unequal shares: the statistics must weigh workers by their words.
    rows = slice(0, 5) if rank == 0 else slice(5, 12)
    results = {kind: _pass(values[rows], target[rows], kind) for kind in ("map", "word")}
    torch.save(results, os.path.join(folder, f"{rank}.pt"))
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.dist
def test_two_workers_equal_one():
    with tempfile.TemporaryDirectory() as folder:
        address = f"file://{folder}/meet"
        multiprocessing.spawn(_worker, (2, address, folder), nprocs=2)
        parts = [torch.load(os.path.join(folder, f"{rank}.pt")) for rank in range(2)]
    values, target = _batch()
    for kind in ("map", "word"):
        x, weight, bias, mean, var = _pass(values, target, kind)
        one, two = (part[kind] for part in parts)
        torch.testing.assert_close(torch.cat([one[0], two[0]]), x, atol=1e-12, rtol=0)
        torch.testing.assert_close(one[1] + two[1], weight, atol=1e-12, rtol=0)
        torch.testing.assert_close(one[2] + two[2], bias, atol=1e-12, rtol=0)
        for part in (one, two):
            torch.testing.assert_close(part[3], mean)
            torch.testing.assert_close(part[4], var)
