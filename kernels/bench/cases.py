"""What is measured: the inputs of every op, ours, and the plain way to write it in torch.

The plain ones do what a straightforward implementation of the paper does: the N x N matrix with masked fills, and
GPO with its GRU run once per sample and torch.sort. Nothing of the implementations that we test is used in them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, logsigmoid, normalize

import d2s.kernels as kernels
from d2s.kernels.gru import position_gru

MARGIN = 0.2
SCALE, BIAS = 1 / 0.07, -10.0
TEMPERATURE = 0.1
CODE = 32


@dataclass(frozen=True, kw_only=True)
class Shape:
    """n rows and columns (samples for GPO) of that width; tokens: of a sample, for GPO alone."""

    n: int
    width: int
    tokens: int = 0

    def __str__(self) -> str:
        return "x".join(str(size) for size in (self.n, self.tokens, self.width) if size)


@dataclass(kw_only=True, eq=False)
class Inputs:
    """One set of inputs: tensors by name, those that get a gradient, and a gradient that arrives from above."""

    tensors: dict[str, Tensor]
    leaves: list[Tensor]
    upstream: Tensor | None = None
    net: nn.Module | None = None

    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.numel() * t.element_size() for t in self.tensors.values())


Run = Callable[[Inputs], Tensor]


@dataclass(frozen=True, kw_only=True)
class Case:
    """make(shape, type, device, seed) gives inputs. flops: (forward, forward and backward) of n * n * width.

    released: as public code has it, where that is not the plain way.
    flops are the least of any method that does not store the n x n matrix: what it makes again is counted.
    traffic: reads and writes of the largest input, forward alone and both, of the least method.
    """

    make: Callable[[Shape, torch.dtype, str, int], Inputs]
    ours: Run
    plain: Run
    released: Run | None = None
    flops: tuple[int, int] = (0, 0)
    traffic: tuple[int, int] = (2, 4)


def _generator(device: str, seed: int) -> torch.Generator:
    return torch.Generator(device=device).manual_seed(seed)


def _sides(shape: Shape, dtype: torch.dtype, device: str, seed: int) -> Inputs:
    """Embeddings of a model half trained (positives at 0.5), two captions an image at times."""
    g = _generator(device, seed)
    n = shape.n
    image = normalize(torch.randn(n, shape.width, generator=g, device=device), dim=1)
    noise = normalize(torch.randn(n, shape.width, generator=g, device=device), dim=1)
    text = normalize(image + 3**0.5 * noise, dim=1)
    at = torch.arange(n, device=device)
    image, text = (x.to(dtype).requires_grad_() for x in (image, text))
    scale, bias = (torch.tensor([x], device=device, requires_grad=True) for x in (SCALE, BIAS))
    tensors = {"image": image, "text": text, "ids": at - (at % 16 == 1).long(), "scale": scale, "bias": bias}
    return Inputs(tensors=tensors, leaves=[image, text])


def _with(case: Callable[..., Inputs], *names: str) -> Callable[..., Inputs]:
    """The same inputs, with gradients to some more of them."""

    def make(shape: Shape, dtype: torch.dtype, device: str, seed: int) -> Inputs:
        inputs = case(shape, dtype, device, seed)
        inputs.leaves += [inputs.tensors[name] for name in names]
        return inputs

    return make


def _pair(shape: Shape, dtype: torch.dtype, device: str, seed: int) -> Inputs:
    inputs = _sides(shape, dtype, device, seed)
    student, teacher = inputs.tensors["image"], inputs.tensors["text"].detach()
    return Inputs(tensors={"student": student, "teacher": teacher}, leaves=[student])


def _retrieval(shape: Shape, dtype: torch.dtype, device: str, seed: int) -> Inputs:
    tensors = _sides(shape, dtype, device, seed).tensors
    return Inputs(tensors={k: tensors[k].detach() for k in ("image", "text", "ids")}, leaves=[])


class _Weights(nn.Module):
    """GPO's weights (n, K) from position codes (n, K, 32), as in the paper."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(CODE, CODE, 1, batch_first=True, bidirectional=True)
        self.linear = nn.Linear(CODE, 1, bias=False)

    def forward(self, code: Tensor, pack: bool = False) -> Tensor:
        hidden = self._packed(code) if pack else self.gru(code)[0]
        mean = (hidden[..., :CODE] + hidden[..., CODE:]) / 2
        return torch.softmax(self.linear(mean).squeeze(2) / TEMPERATURE, dim=1)

    def ours(self, code: Tensor) -> Tensor:
        """The weights (K,) of full samples from one code (K, 32), worked out once as the model does."""
        every = [1] * code.shape[0]
        weights = [value for _, value in self.gru.named_parameters()]
        ahead = position_gru(code, every, *weights[:4])
        back = position_gru(code.flip(0), every, *weights[4:]).flip(0)
        return torch.softmax(self.linear((ahead + back)[:, 0] / 2).squeeze(1) / TEMPERATURE, dim=0)

    def _packed(self, code: Tensor) -> Tensor:
        lengths = torch.full((code.shape[0],), code.shape[1])
        packed = nn.utils.rnn.pack_padded_sequence(code, lengths, batch_first=True, enforce_sorted=False)
        return nn.utils.rnn.pad_packed_sequence(self.gru(packed)[0], batch_first=True)[0]


def _tokens(shape: Shape, dtype: torch.dtype, device: str, seed: int) -> Inputs:
    g = _generator(device, seed)
    features = torch.randn(shape.n, shape.tokens, shape.width, generator=g, device=device).to(dtype)
    features.requires_grad_()
    at = torch.arange(shape.tokens)[:, None] * torch.exp(torch.arange(0, CODE, 2) * (-9.21 / CODE))
    code = torch.stack([at.sin(), at.cos()], dim=2).flatten(1).to(device)
    mask = torch.ones(shape.n, shape.tokens, dtype=torch.bool, device=device)
    upstream = torch.randn(shape.n, shape.width, generator=g, device=device).to(dtype)
    torch.manual_seed(seed)
    net = _Weights().to(device)
    tensors = {"features": features, "code": code, "mask": mask}
    return Inputs(tensors=tensors, leaves=[features, *net.parameters()], upstream=upstream, net=net)


def _similarities(x: Mapping[str, Tensor]) -> Tensor:
    return (x["image"] @ x["text"].t()).float()


def _plain_hinge(hardest: bool) -> Run:
    def run(inputs: Inputs) -> Tensor:
        x = inputs.tensors
        s = _similarities(x)
        matched = s.diag()
        same = x["ids"][:, None] == x["ids"][None, :]
        rows = (MARGIN + s - matched[:, None]).clamp(min=0).masked_fill(same, 0)
        columns = (MARGIN + s - matched[None, :]).clamp(min=0).masked_fill(same, 0)
        if hardest:
            return rows.max(1).values.sum() + columns.max(0).values.sum()
        return rows.sum() + columns.sum()

    return run


def _others(ids: Tensor) -> Tensor:
    """Pairs of the same image that are no positives, (n, n)."""
    return (ids[:, None] == ids[None, :]) & ~torch.eye(ids.shape[0], dtype=torch.bool, device=ids.device)


def _plain_info_nce(inputs: Inputs) -> Tensor:
    x = inputs.tensors
    label = torch.arange(x["ids"].shape[0], device=x["ids"].device)
    z = (x["scale"] * _similarities(x)).masked_fill(_others(x["ids"]), -torch.inf)
    return (cross_entropy(z, label, reduction="sum") + cross_entropy(z.t(), label, reduction="sum")) / 2


def _plain_sigmoid(inputs: Inputs) -> Tensor:
    x = inputs.tensors
    z = x["scale"] * _similarities(x) + x["bias"]
    sign = 2 * torch.eye(z.shape[0], device=z.device) - 1
    return -logsigmoid(sign * z).masked_fill(_others(x["ids"]), 0).sum()


def _plain_relational(inputs: Inputs) -> Tensor:
    student, teacher = inputs.tensors["student"], inputs.tensors["teacher"]
    q = torch.log_softmax((student @ student.t()).float() / TEMPERATURE, dim=1)
    p = torch.log_softmax((teacher @ teacher.t()).float() / TEMPERATURE, dim=1)
    return nn.functional.kl_div(q, p, reduction="sum", log_target=True)


def _plain_pointwise(inputs: Inputs) -> Tensor:
    student, teacher = (normalize(inputs.tensors[k].float(), dim=1) for k in ("student", "teacher"))
    return (1 - (student * teacher).sum(1)).sum()


def _plain_ranks(inputs: Inputs) -> Tensor:
    x = inputs.tensors
    s = _similarities(x)
    same = x["ids"][:, None] == x["ids"][None, :]
    best = s.masked_fill(~same, -torch.inf).amax(1)
    return ((s >= best[:, None]) & ~same).sum(1)


def _plain_gpo(inputs: Inputs, pack: bool = False) -> Tensor:
    features, code, mask = (inputs.tensors[k] for k in ("features", "code", "mask"))
    weights = inputs.net(code.expand(features.shape[0], *code.shape), pack).to(features.dtype)
    filled = features.masked_fill(~mask[:, :, None], -10000.0)
    ordered = filled.sort(dim=1, descending=True).values.masked_fill(~mask[:, :, None], 0)
    return (ordered * weights[:, :, None]).sum(1)


def _released_gpo(inputs: Inputs) -> Tensor:
    """The published layer hands the samples' position codes to its GRU as packed sequences."""
    return _plain_gpo(inputs, pack=True)


def _our_gpo(inputs: Inputs) -> Tensor:
    features, code, mask = (inputs.tensors[k] for k in ("features", "code", "mask"))
    return kernels.gpo_pool(features, inputs.net.ours(code).expand(features.shape[:2]), mask)


def _our_hinge(hardest: bool) -> Run:
    def run(inputs: Inputs) -> Tensor:
        x = inputs.tensors
        return kernels.hinge_loss(x["image"], x["text"], x["ids"], margin=MARGIN, hardest=hardest)

    return run


def _our_info_nce(inputs: Inputs) -> Tensor:
    x = inputs.tensors
    return kernels.info_nce_loss(x["image"], x["text"], x["ids"], scale=x["scale"])


def _our_sigmoid(inputs: Inputs) -> Tensor:
    x = inputs.tensors
    return kernels.sigmoid_loss(x["image"], x["text"], x["ids"], scale=x["scale"], bias=x["bias"])


def _our_relational(inputs: Inputs) -> Tensor:
    x = inputs.tensors
    return kernels.relational_distillation(x["student"], x["teacher"], temperature=TEMPERATURE)


def _our_pointwise(inputs: Inputs) -> Tensor:
    return kernels.pointwise_distillation(inputs.tensors["student"], inputs.tensors["teacher"])


def _our_ranks(inputs: Inputs) -> Tensor:
    x = inputs.tensors
    return kernels.retrieval_ranks(x["image"], x["text"], query_ids=x["ids"], candidate_ids=x["ids"])


CASES: dict[str, Case] = {
    "hinge_max": Case(make=_sides, ours=_our_hinge(True), plain=_plain_hinge(True), flops=(2, 2)),
    "hinge_sum": Case(make=_sides, ours=_our_hinge(False), plain=_plain_hinge(False), flops=(2, 6)),
    "info_nce": Case(make=_with(_sides, "scale"), ours=_our_info_nce, plain=_plain_info_nce, flops=(2, 8)),
    "sigmoid": Case(
        make=_with(_sides, "scale", "bias"), ours=_our_sigmoid, plain=_plain_sigmoid, flops=(2, 6)
    ),
    "relational": Case(make=_pair, ours=_our_relational, plain=_plain_relational, flops=(4, 12)),
    "pointwise": Case(make=_pair, ours=_our_pointwise, plain=_plain_pointwise, traffic=(2, 3)),
    "gpo": Case(make=_tokens, ours=_our_gpo, plain=_plain_gpo, released=_released_gpo, traffic=(1, 2)),
    "ranks": Case(make=_retrieval, ours=_our_ranks, plain=_plain_ranks, flops=(2, 2), traffic=(2, 2)),
}
