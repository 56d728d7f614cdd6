"""Defines the ops to measure. Each op has a plain implementation in torch and a lower bound of its work.

A plain implementation follows the paper's formulas directly. A loss builds the n x n matrix of similarities and masks
it. GPO runs its GRU once per sample and calls torch.sort. The plain implementations share no code with our kernels.
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
    """An op with its plain implementation and the least work that any implementation must do.

    `flops` and `traffic` have one value for the forward pass, and one for forward and backward together. The n x n
    matrix is not stored, so the backward pass computes it again.
    """

    plain: Run
    released: Run | None = None  # the authors' published implementation; None if it equals `plain`
    flops: tuple[int, int] = (0, 0)  # number of operations, in units of n * n * width
    traffic: tuple[int, int] = (2, 4)  # how often an array of the largest input's size is read or written


class Work(NamedTuple):
    """The least work of one run of an op. flops: operations in matrix products. traffic: bytes to read and write."""

    flops: float
    traffic: float

    def floor_ms(self, matmul_tflops: float, copy_gbs: float) -> float:
        """Returns the milliseconds that this work takes at least, at the rates of `timing.device_rates`."""
        return max(self.flops / matmul_tflops / 1e9, self.traffic / copy_gbs / 1e6)


def work(name: str, shape: Shape, dtype: torch.dtype, mode: str) -> Work:
    """Returns the least work of the case `name`. mode: one of `timing.MODES`; "full" is forward and backward."""
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
    """Returns a boolean mask of shape (n, n). An entry is true if it is off the diagonal and its ids are equal."""
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
    """Computes GPO plainly. packed: whether the GRU reads packed sequences, as in the authors' code."""
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
