"""The public interface of `d2s.kernels`: argument checks, then the operators, or the reference where it is chosen.

What is refused (`d2s.kernels.operators.arguments`) raises ValueError in one line: the argument, what it is, the remedy.
Embeddings are dense tensors of bf16, fp16, float32 or float64.

Who computes is in `d2s.kernels.operators.dispatch`: `D2S_KERNELS`, the device and the type decide.

Common to all losses here:
- They are *sums* over the batch, 0-dim, in float32 (float64 for float64 inputs); bf16 and fp16 inputs are
  computed with in float32, also under autocast.
- image (n, D) and text (M, D) are L2-normalised by the caller. Row i's positive is column `offset + i`. With
  one process n = M and offset = 0; a worker passes its own rows, everybody's columns, and where its rows
  begin among them.
- image_ids (n,) and text_ids (M,) are int64; a pair of equal ids shows the same image and is never a
  negative. text_ids defaults to image_ids.
- Gradients flow to both sides, local and gathered.
Sizes: B local batch, N global batch, M candidates, K tokens, D width.
"""

import torch
from torch import Tensor

from d2s.kernels.operators import ops
from d2s.kernels.operators.arguments import (
    check_flag,
    check_floats,
    check_like,
    check_matrix,
    check_number,
    check_positives,
    check_sides,
    number_tensor,
)
from d2s.kernels.operators.dispatch import implementation, load

KINDS = ("cosine", "l1", "l2")
__all__ = [
    "gpo_pool",
    "hinge_loss",
    "implementation",
    "info_nce_loss",
    "pointwise_distillation",
    "relational_distillation",
    "retrieval_ranks",
    "sigmoid_loss",
]


def _dense(x: Tensor) -> bool:
    """Whether the reference computes."""
    return implementation(x.device, x.dtype) == "reference"


def _needs(*inputs: Tensor) -> list[bool]:
    """Which of the inputs want a gradient."""
    grad = torch.is_grad_enabled()
    return [grad and x.requires_grad for x in inputs]


def hinge_loss(
    image: Tensor,
    text: Tensor,
    image_ids: Tensor,
    text_ids: Tensor | None = None,
    *,
    margin: float = 0.2,
    hardest: bool = True,
    offset: int = 0,
    both: bool = True,
) -> Tensor:
    """Sum of hinge violations [margin + S_ij - S_positive]+ over negatives (VSE++, Faghri et al. 2018).

    hardest: only the hardest negative of each row (and column), ties to the lowest index; else all of them.
    both: rows and columns from one sweep (n = M, offset 0); else rows alone, so that two calls with the sides
    exchanged add up to one call with both. A row without negatives costs nothing; the gradient of a violation
    of exactly 0 is 0. Raises ValueError for shapes, types, devices or margins that do not fit.
    """
    text_ids, offset = check_sides(image, text, image_ids, text_ids, offset, both)
    check_flag("hardest", hardest)
    margin = check_number("margin", margin, image)
    if _dense(image):
        return load("reference").hinge_loss(
            image, text, image_ids, text_ids, margin=margin, hardest=hardest, offset=offset, both=both
        )
    if hardest:
        return ops.hinge_max(image, text, image_ids, text_ids, margin, offset, both)[0]
    return ops.hinge_sum(image, text, image_ids, text_ids, margin, offset, both, *_needs(image, text))[0]


def info_nce_loss(
    image: Tensor,
    text: Tensor,
    image_ids: Tensor,
    text_ids: Tensor | None = None,
    *,
    scale: Tensor | float,
    offset: int = 0,
    both: bool = True,
) -> Tensor:
    """Sum of 0.5 * cross entropy of scale * S over rows, and columns if both (CLIP, Radford et al. 2021).

    scale: a number, or a tensor of one entry, which then gets a gradient; the factor itself, not its log.
    Same-image pairs other than the positive are left out of the denominators. The 0.5 stays with both=False:
    two calls with the sides exchanged add up to one call with both. Raises ValueError as `hinge_loss`.
    """
    text_ids, offset = check_sides(image, text, image_ids, text_ids, offset, both)
    scale = number_tensor("scale", scale, image)
    if _dense(image):
        return load("reference").info_nce_loss(
            image, text, image_ids, text_ids, scale=scale, offset=offset, both=both
        )
    return ops.info_nce(image, text, image_ids, text_ids, scale, offset, both)[0]


def sigmoid_loss(
    image: Tensor,
    text: Tensor,
    image_ids: Tensor,
    text_ids: Tensor | None = None,
    *,
    scale: Tensor | float,
    bias: Tensor | float,
    offset: int = 0,
) -> Tensor:
    """Sum over pairs of log(1 + exp(-y * (scale * S + bias))) (SigLIP, Zhai et al. 2023).

    y is 1 for the positive pair and -1 for the others; other pairs of the same image are left out. Every
    pair counts once, so the calls of workers with their own rows add up to one call with the whole batch.
    scale, bias: numbers, or tensors of one entry, which then get gradients. ValueError as `hinge_loss`.
    """
    text_ids, offset = check_sides(image, text, image_ids, text_ids, offset, both=False)
    scale, bias = number_tensor("scale", scale, image), number_tensor("bias", bias, image)
    if _dense(image):
        return load("reference").sigmoid_loss(
            image, text, image_ids, text_ids, scale=scale, bias=bias, offset=offset
        )
    need = _needs(image, text, scale, bias)
    return ops.sigmoid(image, text, image_ids, text_ids, scale, bias, offset, *need)[0]


def pointwise_distillation(
    student: Tensor, teacher: Tensor, *, kind: str = "cosine", normalize: bool = True
) -> Tensor:
    """Sum over rows of the distance of student (B, D) to teacher (B, D); no gradient to the teacher.

    kind: cosine = 1 - s.t, l1 = sum |s - t| and l2 = sum (s - t)^2 over the channels. normalize: both
    sides are L2-normalised first, with its Jacobian in the gradient; a row of zeros stays zero and gets no gradient.
    Raises ValueError for an unknown kind and for sides that do not fit.
    """
    if not isinstance(kind, str) or kind not in KINDS:
        what = repr(kind) if isinstance(kind, str) else f"of type {type(kind).__name__}"
        raise ValueError(f"kind: {what} is unknown; use one of {', '.join(KINDS)}")
    check_flag("normalize", normalize)
    check_matrix("student", student)
    check_like("teacher", teacher, student, tuple(student.shape))
    if _dense(student):
        return load("reference").pointwise_distillation(student, teacher, kind=kind, normalize=normalize)
    return ops.pointwise(student, teacher, kind, normalize, *_needs(student))[0]


def relational_distillation(
    student: Tensor,
    teacher: Tensor,
    student_all: Tensor | None = None,
    teacher_all: Tensor | None = None,
    *,
    temperature: float,
) -> Tensor:
    """Sum over rows of KL(teacher's || student's) softmax of similarities / temperature; none to the teacher.

    student (B, D) and teacher (B, E) rows against student_all (N, D) and teacher_all (N, E), by default
    themselves; L2-normalised by the caller; the widths may differ. A row's similarity with itself takes part.
    Gradients flow to student and student_all. Raises ValueError for sides or temperatures that do not fit.
    """
    check_matrix("student", student)
    check_matrix("teacher", teacher)
    check_like("teacher", teacher, student, (student.shape[0], teacher.shape[1]))
    if (student_all is None) != (teacher_all is None):
        raise ValueError("student_all, teacher_all: only one of them is given; give both or neither")
    if student_all is None:
        student_all, teacher_all = student, teacher
    check_matrix("student_all", student_all)
    check_like("student_all", student_all, student, (student_all.shape[0], student.shape[1]))
    check_like("teacher_all", teacher_all, student, (student_all.shape[0], teacher.shape[1]))
    temperature = check_number("temperature", temperature, student)
    if temperature <= 0:
        raise ValueError(f"temperature: {temperature} is not above 0; give a number that is")
    if _dense(student):
        return load("reference").relational_distillation(
            student, teacher, student_all, teacher_all, temperature=temperature
        )
    need = _needs(student, student_all)
    return ops.relational(student, teacher, student_all, teacher_all, temperature, *need)[0]


def gpo_pool(features: Tensor, weights: Tensor, mask: Tensor) -> Tensor:
    """Generalised pooling (Chen et al. 2021): (B, D) in the type of the features.

    features (B, K, D); weights (B, K): weights[b, k] goes to the k-th largest value of every channel of b,
    and what lies beyond its number of tokens is ignored; mask (B, K) bool, true for real tokens, in any places.
    Each channel is sorted in descending order by itself over the real tokens, ties by the lowest token. A
    sample without tokens gives zeros. Gradients flow to features and weights. Raises ValueError for tensors
    that do not fit.
    """
    check_floats("features", features, 3, "(B, K, D)")
    check_like("weights", weights, features, tuple(features.shape[:2]))
    check_like("mask", mask, features, tuple(features.shape[:2]), torch.bool)
    if _dense(features):
        return load("reference").gpo_pool(features, weights, mask)
    return ops.gpo(features, weights, mask, *_needs(features, weights))[0]


def retrieval_ranks(
    queries: Tensor,
    candidates: Tensor,
    positives: tuple[Tensor, Tensor] | None = None,
    *,
    query_ids: Tensor | None = None,
    candidate_ids: Tensor | None = None,
) -> Tensor:
    """For each query (n, D) the 0-based rank of its best positive among the candidates (M, D): (n,) int64.

    The rank is the number of other candidates whose similarity (dot product) is at least that of the best
    positive: ties, and similarities that are not numbers, count against the model. Positives are either
    a pair (starts (n + 1,), indices) of int64 tensors, query i's being indices[starts[i]:starts[i + 1]], or
    the candidates whose candidate_ids (M,) equal query_ids (n,). A query without any gets rank M. Equal
    candidates tie to the last bit. Raises ValueError for tensors that do not fit, and for starts that do not rise
    from 0 to the number of indices or indices outside 0..M-1: to see those it waits for the device once.
    Compiled, it does not look into the lists, and a wrong one is undefined.
    """
    check_matrix("queries", queries)
    check_matrix("candidates", candidates)
    check_like("candidates", candidates, queries, (candidates.shape[0], queries.shape[1]))
    starts, indices = check_positives(queries, candidates, positives, query_ids, candidate_ids)
    if _dense(queries):
        return load("reference").retrieval_ranks(queries, candidates, positives, query_ids, candidate_ids)
    return ops.retrieval_ranks(queries, candidates, starts, indices, query_ids, candidate_ids)
