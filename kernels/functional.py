"""The public functions of `d2s.kernels`. They check their arguments and call the operators or the reference.

A wrong argument raises ValueError with one line that names the argument, its value and the remedy. Embeddings are
dense tensors of bf16, fp16, float32 or float64. `d2s.kernels.operators.dispatch` chooses the implementation.
`d2s.kernels` explains the letters B, N, K, D and E.

All losses return the *sum* over the batch, as a tensor of shape (), in float32 or, for float64 inputs, in float64.
Losses of bf16 and fp16 inputs are computed in float32, also under autocast. The contrastive losses share arguments:
- `image`, of shape (B, D), and `text`, of shape (N, D), are L2-normalised by the caller. S = image @ text.T is the
  similarity matrix, of shape (B, N). Both inputs get gradients.
- `offset` says where the positives are: the positive of row i is column `offset + i`. With one process, B = N and
  offset = 0. With several workers, each worker passes its local rows, the columns of all workers, and as `offset`
  the column of the positive of its first row.
- `image_ids`, of shape (B,), and `text_ids`, of shape (N,), are int64. A pair with equal ids shows the same image
  and is never a negative. `text_ids` defaults to `image_ids`.
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
    """Returns a list of booleans. An entry is true if the input at the same index needs a gradient."""
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
    """Returns the sum over negatives of max(0, margin + S_ij - S_positive) (VSE++, Faghri et al. 2018).

    S_positive is the similarity of the positive in the same row or column. A negative violates the margin if its
    term is above 0. If `hardest`, only the most similar negative of each row and column counts, and ties go to the
    lowest index. Otherwise all negatives count. If `both`, rows and columns count, and B = N and offset = 0 are
    required. Otherwise only rows count. Two calls without `both`, the second with image and text exchanged, add up
    to one call with `both`. A row without negatives costs 0. If margin + S_ij - S_positive is exactly 0, its
    gradient is 0. Raises ValueError for an invalid shape, type, device or margin.
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
    """Returns 0.5 * cross entropy of scale * S, summed over rows and, if `both`, columns (CLIP, Radford et al. 2021).

    `scale` is the factor itself, not its logarithm. It is a number, or a tensor of one entry, which can get a
    gradient. The denominators include the positive, but no other pair of the same image. The factor 0.5 also
    applies if `both` is false. So two calls without `both`, the second with image and text exchanged, add up to
    one call with `both`. Raises ValueError for an invalid shape, type, device or scale.
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

    y is 1 for a positive pair and -1 for a negative pair. The sum skips pairs that show the same image but are
    not positives. `scale` and `bias` are numbers, or tensors of one entry, which can get gradients. Every pair
    counts once. So the losses of all workers add up to the loss of the global batch. Raises ValueError for an
    invalid shape, type, device, scale or bias.
    """
    sides = check_sides(image, text, image_ids, text_ids, offset, both=False)
    scale, bias = number_tensor("scale", scale, image), number_tensor("bias", bias, image)
    if uses_reference(image):
        return load("reference").sigmoid_loss(sides, scale, bias)
    return ops.sigmoid(*sides, scale, bias, *_needs(image, text, scale, bias))[0]


def pointwise_distillation(
    student: Tensor, teacher: Tensor, *, kind: str = "cosine", normalize: bool = True
) -> Tensor:
    """Returns the sum over rows of the distance between `student` and `teacher`, both of shape (B, D).

    `kind` selects the distance of two rows s and t. "cosine" is 1 - s.t, "l1" is sum |s - t|, and "l2" is
    sum (s - t)^2. If `normalize`, rows of both tensors are first L2-normalised. The gradient includes the
    normalisation. A row of zeros stays zero and gets the gradient 0. The teacher never gets a gradient.
    Raises ValueError for an unknown kind and for an invalid shape, type or device.
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

    p_student is computed from the similarities student @ student_all.T, for tensors of shapes (B, D) and (N, D).
    p_teacher is computed from teacher @ teacher_all.T, for tensors of shapes (B, E) and (N, E). `student_all`
    defaults to `student` and `teacher_all` to `teacher`. The caller L2-normalises all inputs. `student` and
    `student_all` get gradients. The teacher's tensors get none. Raises ValueError for an invalid shape, type,
    device or temperature.
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
    """Pools `features`, of shape (B, K, D), over the tokens (generalised pooling operator, Chen et al. 2021).

    Returns a tensor of shape (B, D) in the type of `features`. `mask`, boolean and of shape (B, K), is true for
    real tokens, which can be at any positions. In each sample b, each channel is sorted independently, in
    descending order over the real tokens. Ties go to the lowest token. The result is the sum over k of
    weights[b, k] times the k-th largest value, so a sample with L real tokens uses the first L of its K weights.
    A sample without tokens gives zeros. `features` and `weights`, of shape (B, K), get gradients. Raises
    ValueError for an invalid shape, type or device.
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
    """Returns the 0-based rank of each query's most similar positive, as an int64 tensor of shape (B,).

    `queries` has the shape (B, D) and `candidates` the shape (N, D). The similarity is the dot product. The rank
    is the number of candidates that are not positives and whose similarity is not below the best positive's. So
    ties and NaN count against the model. Equal candidates tie exactly. A query without positives gets rank N.

    Positives are given in one of two forms. `positives` is a pair of int64 tensors: `starts`, of shape (B + 1,),
    and `indices`. The positives of query i are indices[starts[i]:starts[i + 1]]. In the other form, the positives
    of query i are the candidates j with candidate_ids[j] == query_ids[i].

    Raises ValueError for an invalid shape, type or device, if `starts` does not rise from 0 to the number of
    indices, and for indices outside 0..N-1. The check of `positives` waits for the device once. torch.compile
    skips this check. Under torch.compile, wrong lists give undefined ranks.
    """
    check_tensor("queries", queries, ("B", "D"))
    check_tensor("candidates", candidates, ("N", queries.shape[1]), queries)
    check_positives(queries, candidates, positives, query_ids, candidate_ids)
    if uses_reference(queries):
        return load("reference").retrieval_ranks(queries, candidates, positives, query_ids, candidate_ids)
    starts, indices = positives or (None, None)
    return ops.retrieval_ranks(queries, candidates, starts, indices, query_ids, candidate_ids)
