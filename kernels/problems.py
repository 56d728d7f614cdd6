"""Makes inputs of a given size for every op, and runs the op on these inputs. The benchmark and the tuner use it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from d2s import kernels
from d2s.kernels.gru import position_gru

MARGIN = 0.2
SCALE, BIAS = 1 / 0.07, -10.0
TEMPERATURE = 0.1
# Width of GPO's position codes.
CODE = 32


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The size of an op's inputs."""

    n: int  # number of pairs of embeddings or, for GPO, of samples
    width: int  # width of an embedding or, for GPO, of a feature vector
    tokens: int = 0  # number of feature vectors in each sample of GPO; 0 for other ops

    def __str__(self) -> str:
        return "x".join(str(size) for size in (self.n, self.tokens, self.width) if size)


@dataclass(kw_only=True, eq=False)
class Inputs:
    """The inputs of an op."""

    tensors: dict[str, Tensor]  # the inputs by name
    leaves: list[Tensor]  # the tensors that get a gradient
    upstream: Tensor | None = None  # the gradient with respect to the op's result; None stands for 1
    net: nn.Module | None = None  # the module that computes GPO's weights; None for other ops

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def nbytes(self) -> int:
        """Returns the size of all tensors together, in bytes."""
        return sum(t.numel() * t.element_size() for t in self.tensors.values())

    def gradients(self, value: Tensor) -> tuple[Tensor, ...]:
        """Returns the gradients of the op's result `value` with respect to the leaves. Returns () without leaves."""
        return torch.autograd.grad(value, self.leaves, self.upstream) if self.leaves else ()


Run = Callable[[Inputs], Tensor]


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One of our ops. `make(shape, dtype, device, seed)` returns inputs. `ours(inputs)` runs the op on inputs."""

    make: Callable[[Shape, torch.dtype, str, int], Inputs]
    ours: Run


def one_line(error: Exception) -> str:
    """Returns one line with the type of an exception and the first 200 characters of its message."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


class GpoWeights(nn.Module):
    """Computes GPO's weights, of shape (n, K), from position codes, of shape (n, K, 32), with the paper's GRU."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(CODE, CODE, 1, batch_first=True, bidirectional=True)
        self.linear = nn.Linear(CODE, 1, bias=False)

    def forward(self, code: Tensor, packed: bool = False) -> Tensor:
        """Returns the weights. packed: whether the GRU reads packed sequences, as in the authors' code."""
        hidden = self._run_packed(code) if packed else self.gru(code)[0]
        mean = (hidden[..., :CODE] + hidden[..., CODE:]) / 2
        return torch.softmax(self.linear(mean).squeeze(2) / TEMPERATURE, dim=1)

    def once(self, code: Tensor) -> Tensor:
        """Returns the weights, of shape (K,), for samples of K tokens. code: position codes, of shape (K, 32)."""
        every = [1] * code.shape[0]
        weights = [value for _, value in self.gru.named_parameters()]
        ahead = position_gru(code, every, *weights[:4])
        back = position_gru(code.flip(0), every, *weights[4:]).flip(0)
        return torch.softmax(self.linear((ahead + back)[:, 0] / 2).squeeze(1) / TEMPERATURE, dim=0)

    def _run_packed(self, code: Tensor) -> Tensor:
        lengths = torch.full((code.shape[0],), code.shape[1])
        sequences = nn.utils.rnn.pack_padded_sequence(code, lengths, batch_first=True, enforce_sorted=False)
        return nn.utils.rnn.pad_packed_sequence(self.gru(sequences)[0], batch_first=True)[0]


def _sides(
    shape: Shape, dtype: torch.dtype, device: str, seed: int, more_leaves: Sequence[str] = ()
) -> Inputs:
    """Makes embeddings. Positives have a cosine of about 0.5. In every 16 pairs, two have the same image id.

    more_leaves: names of tensors that get a gradient, in addition to the embeddings.
    """
    g = torch.Generator(device=device).manual_seed(seed)
    n = shape.n
    image = normalize(torch.randn(n, shape.width, generator=g, device=device), dim=1)
    noise = normalize(torch.randn(n, shape.width, generator=g, device=device), dim=1)
    text = normalize(image + 3**0.5 * noise, dim=1)
    at = torch.arange(n, device=device)
    image, text = (x.to(dtype).requires_grad_() for x in (image, text))
    scale, bias = (torch.tensor([x], device=device, requires_grad=True) for x in (SCALE, BIAS))
    tensors = {"image": image, "text": text, "ids": at - (at % 16 == 1).long(), "scale": scale, "bias": bias}
    return Inputs(tensors=tensors, leaves=[image, text, *(tensors[name] for name in more_leaves)])


def _student_and_teacher(shape: Shape, dtype: torch.dtype, device: str, seed: int) -> Inputs:
    sides = _sides(shape, dtype, device, seed)
    student, teacher = sides["image"], sides["text"].detach()
    return Inputs(tensors={"student": student, "teacher": teacher}, leaves=[student])


def _retrieval(shape: Shape, dtype: torch.dtype, device: str, seed: int) -> Inputs:
    sides = _sides(shape, dtype, device, seed)
    return Inputs(tensors={name: sides[name].detach() for name in ("image", "text", "ids")}, leaves=[])


def _tokens(shape: Shape, dtype: torch.dtype, device: str, seed: int) -> Inputs:
    g = torch.Generator(device=device).manual_seed(seed)
    features = torch.randn(shape.n, shape.tokens, shape.width, generator=g, device=device).to(dtype)
    features.requires_grad_()
    at = torch.arange(shape.tokens)[:, None] * torch.exp(torch.arange(0, CODE, 2) * (-9.21 / CODE))
    code = torch.stack([at.sin(), at.cos()], dim=2).flatten(1).to(device)
    mask = torch.ones(shape.n, shape.tokens, dtype=torch.bool, device=device)
    upstream = torch.randn(shape.n, shape.width, generator=g, device=device).to(dtype)
    torch.manual_seed(seed)
    net = GpoWeights().to(device)
    tensors = {"features": features, "code": code, "mask": mask}
    return Inputs(tensors=tensors, leaves=[features, *net.parameters()], upstream=upstream, net=net)


def _hinge(x: Inputs, hardest: bool) -> Tensor:
    return kernels.hinge_loss(x["image"], x["text"], x["ids"], margin=MARGIN, hardest=hardest)


def _info_nce(x: Inputs) -> Tensor:
    return kernels.info_nce_loss(x["image"], x["text"], x["ids"], scale=x["scale"])


def _sigmoid(x: Inputs) -> Tensor:
    return kernels.sigmoid_loss(x["image"], x["text"], x["ids"], scale=x["scale"], bias=x["bias"])


def _relational(x: Inputs) -> Tensor:
    return kernels.relational_distillation(x["student"], x["teacher"], temperature=TEMPERATURE)


def _pointwise(x: Inputs) -> Tensor:
    return kernels.pointwise_distillation(x["student"], x["teacher"])


def _gpo(x: Inputs) -> Tensor:
    return kernels.gpo_pool(x["features"], x.net.once(x["code"]).expand(x["features"].shape[:2]), x["mask"])


def _ranks(x: Inputs) -> Tensor:
    return kernels.retrieval_ranks(x["image"], x["text"], query_ids=x["ids"], candidate_ids=x["ids"])


PROBLEMS: dict[str, Problem] = {
    "hinge_max": Problem(make=_sides, ours=partial(_hinge, hardest=True)),
    "hinge_sum": Problem(make=_sides, ours=partial(_hinge, hardest=False)),
    "info_nce": Problem(make=partial(_sides, more_leaves=["scale"]), ours=_info_nce),
    "sigmoid": Problem(make=partial(_sides, more_leaves=["scale", "bias"]), ours=_sigmoid),
    "relational": Problem(make=_student_and_teacher, ours=_relational),
    "pointwise": Problem(make=_student_and_teacher, ours=_pointwise),
    "gpo": Problem(make=_tokens, ours=_gpo),
    "ranks": Problem(make=_retrieval, ours=_ranks),
}
