"""The public functions of `d2s.kernels`: they check the arguments and call the operators, or the reference.

Wrong arguments raise ValueError in one line: the argument, what it is, the remedy. Embeddings are dense tensors of
bf16, fp16, float32 or float64. Which implementation computes: see `d2s.kernels.operators.dispatch`.

Common to all losses:
- They are *sums* over the batch, 0-dim, in float32 (float64 for float64 inputs). bf16 and fp16 inputs are
  computed in float32, also under autocast.
- image (B, D) and text (N, D) are L2-normalised by the caller. Row i's positive is column `offset + i`. With
  one process B = N and offset = 0; a worker passes its own rows, the columns of all workers, and the place where
  its rows begin among them.
- image_ids (B,) and text_ids (N,) are int64. A pair of equal ids shows the same image and is never a
  negative. text_ids defaults to image_ids.
- Gradients flow to both sides, local and gathered.
"""

import torch
from torch import Tensor

from d2s.kernels.operators import ops
from d2s.kernels.operators.arguments import (
    check_flag,
    check_number,
    check_positives,
    check_sides,
    check_tensor,
    number_tensor,
)
from d2s.kernels.operators.dispatch import implementation, load, uses_reference

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


def _needs(*inputs: Tensor) -> list[bool]:
    """Which of the inputs need a gradient."""
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

    hardest: only the hardest negative of each row (and column), ties to the lowest index; else all negatives.
    both: rows and columns from one sweep (B = N, offset 0); else rows alone. Two calls with the sides exchanged
    add up to one call with both. A row without negatives costs nothing; the gradient of a violation of exactly 0
    is 0. Raises ValueError for shapes, types, devices or margins that do not fit.
    """
    sides = check_sides(image, text, image_ids, text_ids, offset, both)
    check_flag("hardest", hardest)
    margin = check_number("margin", margin, image)
    if uses_reference(image):
        return load("reference").hinge_loss(sides, margin, hardest)
    if hardest:
        return ops.hinge_max(*sides, margin)[0]
    return ops.hinge_sum(*sides, margin, *_needs(image, text))[0]


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

    scale: the factor itself, not its log; a number, or a tensor of one entry, which then gets a gradient.
    Same-image pairs other than the positive are left out of the denominators. The factor 0.5 stays with
    both=False: two calls with the sides exchanged add up to one call with both. ValueError as `hinge_loss`.
    """
    sides = check_sides(image, text, image_ids, text_ids, offset, both)
    scale = number_tensor("scale", scale, image)
    if uses_reference(image):
        return load("reference").info_nce_loss(sides, scale)
    return ops.info_nce(*sides, scale)[0]


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

    y is 1 for the positive pair and -1 for negatives; other pairs of the same image are left out. Every pair
    counts once, so the losses of workers with their own rows add up to that of the global batch.
    scale, bias: numbers, or tensors of one entry, which then get gradients. ValueError as `hinge_loss`.
    """
    sides = check_sides(image, text, image_ids, text_ids, offset, both=False)
    scale, bias = number_tensor("scale", scale, image), number_tensor("bias", bias, image)
    if uses_reference(image):
        return load("reference").sigmoid_loss(sides, scale, bias)
    return ops.sigmoid(*sides, scale, bias, *_needs(image, text, scale, bias))[0]


def pointwise_distillation(
    student: Tensor, teacher: Tensor, *, kind: str = "cosine", normalize: bool = True
) -> Tensor:
    """Sum over rows of the distance of student (B, D) to teacher (B, D). The teacher gets no gradient.

    kind: cosine = 1 - s.t, l1 = sum |s - t| or l2 = sum (s - t)^2 over the channels. normalize: both sides are
    L2-normalised first, and the gradient goes through that; a row of zeros stays zero and gets no gradient.
    Raises ValueError for an unknown kind and for sides that do not fit.
    """
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(f"kind: {kind!r} is unknown; use one of {', '.join(KINDS)}")
    check_flag("normalize", normalize)
    check_tensor("student", student, ("B", "D"))
    check_tensor("teacher", teacher, tuple(student.shape), student)
    if uses_reference(student):
        return load("reference").pointwise_distillation(student, teacher, kind, normalize)
    return ops.pointwise(student, teacher, kind, normalize, *_needs(student))[0]


def relational_distillation(
    student: Tensor,
    teacher: Tensor,
    student_all: Tensor | None = None,
    teacher_all: Tensor | None = None,
    *,
    temperature: float,
) -> Tensor:
    """Sum over rows of KL(p_teacher || p_student), p = softmax(similarities / temperature).

    The rows student (B, D) and teacher (B, E) are compared with student_all (N, D) and teacher_all (N, E), by default
    with each other, each row also with itself. The caller L2-normalises all of them. Gradients flow to student
    and student_all, none to the teacher. Raises ValueError for sides or temperatures that do not fit.
    """
    check_tensor("student", student, ("B", "D"))
    check_tensor("teacher", teacher, (student.shape[0], "E"), student)
    if (student_all is None) != (teacher_all is None):
        raise ValueError("student_all, teacher_all: only one of them is given; give both or neither")
    if student_all is None:
        student_all, teacher_all = student, teacher
    check_tensor("student_all", student_all, ("N", student.shape[1]), student)
    check_tensor("teacher_all", teacher_all, (student_all.shape[0], teacher.shape[1]), student)
    temperature = check_number("temperature", temperature, student)
    if temperature <= 0:
        raise ValueError(f"temperature: {temperature} is not above 0; give a positive number")
    arguments = student, teacher, student_all, teacher_all, temperature
    if uses_reference(student):
        return load("reference").relational_distillation(*arguments)
    return ops.relational(*arguments, *_needs(student, student_all))[0]


def gpo_pool(features: Tensor, weights: Tensor, mask: Tensor) -> Tensor:
    """Generalised pooling (Chen et al. 2021): (B, D) in the type of the features.

    features (B, K, D); mask (B, K) bool, true for real tokens, in any places; weights (B, K), of which a sample
    with L real tokens uses the first L. Each channel by itself is sorted in descending order over the real
    tokens, ties by the lowest token, and weights[b, k] multiplies its k-th largest value. A sample without tokens
    gives zeros. Gradients flow to features and weights. Raises ValueError for tensors that do not fit.
    """
    check_tensor("features", features, ("B", "K", "D"), empty=True)
    check_tensor("weights", weights, tuple(features.shape[:2]), features)
    check_tensor("mask", mask, tuple(features.shape[:2]), features, (torch.bool,))
    if uses_reference(features):
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
    """For each query (B, D) the 0-based rank of its best positive among the candidates (N, D): (B,) int64.

    The rank is the number of other candidates whose similarity (dot product) is at least that of the best
    positive: ties and NaN count against the model, and equal candidates tie to the last bit. A query without
    positives gets rank N. Positives are either a pair (starts (B + 1,), indices) of int64 tensors, query i's
    being indices[starts[i]:starts[i + 1]], or the candidates whose candidate_ids (N,) equal query_ids (B,).

    Raises ValueError for tensors that do not fit, for starts that do not rise from 0 to the number of indices, and
    for indices outside 0..N-1. Checking the lists waits for the device once; under torch.compile they are not
    checked, and wrong ones give undefined ranks.
    """
    check_tensor("queries", queries, ("B", "D"))
    check_tensor("candidates", candidates, ("N", queries.shape[1]), queries)
    check_positives(queries, candidates, positives, query_ids, candidate_ids)
    if uses_reference(queries):
        return load("reference").retrieval_ranks(queries, candidates, positives, query_ids, candidate_ids)
    starts, indices = positives or (None, None)
    return ops.retrieval_ranks(queries, candidates, starts, indices, query_ids, candidate_ids)
