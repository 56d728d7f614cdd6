"""What is measured: each op, the plain way to write it in torch, and the least work that any method has to do.

The plain ways do what a straightforward implementation of the paper does: the N x N matrix with masked fills, and
GPO with its GRU run once per sample and torch.sort. They use nothing of the implementations that we test.
"""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, logsigmoid, normalize

from d2s.kernels.problems import MARGIN, PROBLEMS, TEMPERATURE, Inputs, Problem, Run, Shape


@dataclass(frozen=True, kw_only=True)
class Case(Problem):
    """An op with its plain way. released: as public code has it, where that differs from the plain way.

    flops: (forward, forward and backward) in units of n * n * width; the least of any method that does not store
    the n x n matrix, so recomputing it counts. traffic: (forward, forward and backward) reads and writes of the
    largest input by the least method.
    """

    plain: Run
    released: Run | None = None
    flops: tuple[int, int] = (0, 0)
    traffic: tuple[int, int] = (2, 4)


class Work(NamedTuple):
    """One step's floating-point operations in matrix products, and bytes read and written once."""

    flops: float
    traffic: float

    def floor_ms(self, matmul_tflops: float, copy_gbs: float) -> float:
        """The least milliseconds at a device's rates: those of the slower of the two."""
        return max(self.flops / matmul_tflops / 1e9, self.traffic / copy_gbs / 1e6)


def work(name: str, shape: Shape, dtype: torch.dtype, mode: str) -> Work:
    """The least work of a case in a mode; backward alone has what both have, less the forward's part."""
    flops, traffic = (
        {"forward": forward, "full": both, "backward": both - forward}[mode]
        for forward, both in (CASES[name].flops, CASES[name].traffic)
    )
    entries = shape.n * shape.width * max(shape.tokens, 1)
    return Work(float(flops * shape.n * shape.n * shape.width), float(traffic * entries * dtype.itemsize))


def _similarities(x: Inputs) -> Tensor:
    return (x["image"] @ x["text"].t()).float()


def _hinge(x: Inputs, hardest: bool) -> Tensor:
    s = _similarities(x)
    matched = s.diag()
    same = x["ids"][:, None] == x["ids"][None, :]
    rows = (MARGIN + s - matched[:, None]).clamp(min=0).masked_fill(same, 0)
    columns = (MARGIN + s - matched[None, :]).clamp(min=0).masked_fill(same, 0)
    if hardest:
        return rows.max(1).values.sum() + columns.max(0).values.sum()
    return rows.sum() + columns.sum()


def _same_image(ids: Tensor) -> Tensor:
    """(n, n): pairs of the same image that are not positives."""
    return (ids[:, None] == ids[None, :]) & ~torch.eye(ids.shape[0], dtype=torch.bool, device=ids.device)


def _info_nce(x: Inputs) -> Tensor:
    label = torch.arange(x["ids"].shape[0], device=x["ids"].device)
    z = (x["scale"] * _similarities(x)).masked_fill(_same_image(x["ids"]), -torch.inf)
    return (cross_entropy(z, label, reduction="sum") + cross_entropy(z.t(), label, reduction="sum")) / 2


def _sigmoid(x: Inputs) -> Tensor:
    z = x["scale"] * _similarities(x) + x["bias"]
    sign = 2 * torch.eye(z.shape[0], device=z.device) - 1
    return -logsigmoid(sign * z).masked_fill(_same_image(x["ids"]), 0).sum()


def _relational(x: Inputs) -> Tensor:
    q, p = (
        torch.log_softmax((side @ side.t()).float() / TEMPERATURE, dim=1)
        for side in (x["student"], x["teacher"])
    )
    return kl_div(q, p, reduction="sum", log_target=True)


def _pointwise(x: Inputs) -> Tensor:
    student, teacher = (normalize(x[name].float(), dim=1) for name in ("student", "teacher"))
    return (1 - (student * teacher).sum(1)).sum()


def _ranks(x: Inputs) -> Tensor:
    s = _similarities(x)
    same = x["ids"][:, None] == x["ids"][None, :]
    best = s.masked_fill(~same, -torch.inf).amax(1)
    return ((s >= best[:, None]) & ~same).sum(1)


def _gpo(x: Inputs, packed: bool = False) -> Tensor:
    """packed: the published layer gives its GRU the samples' position codes as packed sequences."""
    features, code, mask = x["features"], x["code"], x["mask"]
    weights = x.net(code.expand(features.shape[0], *code.shape), packed).to(features.dtype)
    filled = features.masked_fill(~mask[:, :, None], -10000.0)
    ordered = filled.sort(dim=1, descending=True).values.masked_fill(~mask[:, :, None], 0)
    return (ordered * weights[:, :, None]).sum(1)


def _case(name: str, plain: Run, **other: object) -> Case:
    return Case(**vars(PROBLEMS[name]), plain=plain, **other)


CASES: dict[str, Case] = {
    "hinge_max": _case("hinge_max", partial(_hinge, hardest=True), flops=(2, 2)),
    "hinge_sum": _case("hinge_sum", partial(_hinge, hardest=False), flops=(2, 6)),
    "info_nce": _case("info_nce", _info_nce, flops=(2, 8)),
    "sigmoid": _case("sigmoid", _sigmoid, flops=(2, 6)),
    "relational": _case("relational", _relational, flops=(4, 12)),
    "pointwise": _case("pointwise", _pointwise, traffic=(2, 3)),
    "gpo": _case("gpo", _gpo, released=partial(_gpo, packed=True), traffic=(1, 2)),
    "ranks": _case("ranks", _ranks, flops=(2, 2), traffic=(2, 2)),
}
