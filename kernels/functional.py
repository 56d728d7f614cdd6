"""The public functions of `d2s.kernels`: they check their arguments and call the operators, or the reference.

A wrong argument raises ValueError with one line: the argument, its value, the remedy. Embeddings are dense
tensors of bf16, fp16, float32 or float64. `d2s.kernels.operators.dispatch` chooses the implementation.

Common to all losses:
- A loss is the *sum* over the batch: a 0-dim tensor of float32 (of float64 for float64 inputs). Losses of
  bf16 and fp16 inputs are computed in float32, also under autocast.
- The caller L2-normalises image (B, D) and text (N, D). The positive of row i is column `offset + i`. With
  one process, B = N and offset = 0. With several workers, each passes its own rows, the columns of all
  workers, and as `offset` the column of its first row's positive.
- image_ids (B,) and text_ids (N,) are int64. A pair with equal ids shows the same image and is never a
  negative. text_ids defaults to image_ids.
- Both inputs get gradients: the local rows and the gathered columns.
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
    """Returns for each input whether it needs a gradient."""
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
    """Returns the sum of violations [margin + S_ij - S_positive]+ over negatives (VSE++, Faghri et al. 2018).

    With `hardest`, only the hardest negative of each row (and column) counts; ties go to the lowest index.
    Otherwise all negatives count. With `both`, rows and columns count, and B = N and offset 0 are required;
    otherwise only rows count. Two calls without `both`, the second with image and text exchanged, add up to
    one call with `both`. A row without negatives costs nothing. A violation of exactly 0 has the gradient 0.
    Raises ValueError for shapes, types, devices or margins that do not fit.
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
    """Returns 0.5 * cross entropy of scale * S, summed over rows and, with `both`, columns.

    CLIP, Radford et al. 2021. `scale` is the factor itself, not its logarithm. It is a number, or a tensor of
    one entry, which can get a gradient. The denominators leave out pairs of the same image, except the
    positive. The factor 0.5 also applies with both=False: two such calls, the second with image and text
    exchanged, add up to one call with `both`. Raises ValueError like `hinge_loss`.
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
    """Returns the sum over pairs of log(1 + exp(-y * (scale * S + bias))) (SigLIP, Zhai et al. 2023).

    y is 1 for a positive pair and -1 for a negative one. Other pairs of the same image are left out. `scale`
    and `bias` are numbers, or tensors of one entry, which can get gradients. Every pair counts once, so the
    losses of all workers add up to the loss of the global batch. Raises ValueError like `hinge_loss`.
    """
    sides = check_sides(image, text, image_ids, text_ids, offset, both=False)
    scale, bias = number_tensor("scale", scale, image), number_tensor("bias", bias, image)
    if uses_reference(image):
        return load("reference").sigmoid_loss(sides, scale, bias)
    return ops.sigmoid(*sides, scale, bias, *_needs(image, text, scale, bias))[0]


def pointwise_distillation(
    student: Tensor, teacher: Tensor, *, kind: str = "cosine", normalize: bool = True
) -> Tensor:
    """Returns the sum over rows of the distance between student (B, D) and teacher (B, D).

    `kind` selects the distance: "cosine" is 1 - s.t, "l1" is sum |s - t|, "l2" is sum (s - t)^2. With
    `normalize`, both sides are first L2-normalised, and the gradient includes this step; a row of zeros stays
    zero and gets no gradient. The teacher never gets a gradient. Raises ValueError for an unknown kind and
    for sides that do not fit.
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
    """Returns the sum over rows of KL(p_teacher || p_student), with p = softmax(similarities / temperature).

    The similarities are those of student (B, D) with student_all (N, D), and of teacher (B, E) with
    teacher_all (N, E). Without the `..._all` arguments, rows are compared with each other, and each also with
    itself. The caller L2-normalises all inputs. `student` and `student_all` get gradients, the teacher none.
    Raises ValueError for sides or temperatures that do not fit.
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
    """Pools features (B, K, D) to (B, D), in the same type (generalised pooling, Chen et al. 2021).

    The bool mask (B, K) is true for real tokens, at any positions. Each channel is sorted by itself, in
    descending order over the real tokens; ties go to the lowest token. Then weights[b, k] multiplies the k-th
    largest value. A sample with L real tokens uses the first L of its weights (B, K). A sample without tokens
    gives zeros. Features and weights get gradients. Raises ValueError for tensors that do not fit.
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
    """Returns the 0-based rank of each query's best positive: (B,) int64.

    Queries are (B, D), candidates (N, D). The rank is the number of other candidates whose similarity (dot
    product) is at least that of the best positive. So ties and NaN count against the model; equal candidates
    always tie exactly. A query without positives gets rank N.

    Positives are given in one of two forms. `positives` is a pair of int64 tensors, starts (B + 1,) and
    indices: the positives of query i are indices[starts[i]:starts[i + 1]]. Or the positives of query i are
    the candidates whose entry in candidate_ids (N,) equals query_ids[i], with query_ids (B,).

    Raises ValueError for tensors that do not fit, for starts that do not rise from 0 to the number of
    indices, and for indices outside 0..N-1. The check of the lists waits for the device once. torch.compile
    skips this check; wrong lists then give undefined ranks.
    """
    check_tensor("queries", queries, ("B", "D"))
    check_tensor("candidates", candidates, ("N", queries.shape[1]), queries)
    check_positives(queries, candidates, positives, query_ids, candidate_ids)
    if uses_reference(queries):
        return load("reference").retrieval_ranks(queries, candidates, positives, query_ids, candidate_ids)
    starts, indices = positives or (None, None)
    return ops.retrieval_ranks(queries, candidates, starts, indices, query_ids, candidate_ids)
