"""Registers the kernels as torch operators `d2s::...`, with their schemas, output shapes and gradients.

A torch schema takes no tuples. So the operators take the fields of `Sides` and `Winners` as separate arguments.
`torch.compile` does not look inside an operator, so a compiled model computes the same bits.
Some operators compute gradients in the forward and return them after the loss, in the accumulator type. Each
argument need_... says whether a gradient is needed. A gradient that is not needed is returned as an empty tensor.
The other operators have a second operator for the backward. `d2s.kernels.functional` describes the arguments.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from d2s.kernels.dtypes import accumulator, position_dtype
from d2s.kernels.operators.define import Gradients, define, differentiable, gradient_in_forward, no_gradient
from d2s.kernels.operators.dispatch import backend
from d2s.kernels.sides import Sides, Winners

_SIDES = "Tensor image, Tensor text, Tensor image_ids, Tensor text_ids, SymInt offset, bool both"
# Index of the first argument after the fields of `Sides`.
_OWN = _SIDES.count(",") + 1


def _run(name: str, *, sides: bool, need: int) -> Callable:
    """Returns a function that packs an operator's arguments and passes them to the implementation's function `name`.

    sides: whether to pack the first arguments as `Sides`. need: how many of the last arguments to pack as a tuple.
    """

    def run(*arguments):
        function = getattr(backend(arguments[0]), name)
        if need:
            arguments = *arguments[:-need], arguments[-need:]
        return function(Sides(*arguments[:_OWN]), *arguments[_OWN:]) if sides else function(*arguments)

    return run


def _new(like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    return like.new_empty(shape, dtype=dtype or accumulator(like.dtype))


def _like(x: Tensor, needed: bool, dtype: torch.dtype | None = None) -> Tensor:
    """Returns an uninitialised, contiguous tensor with the shape of `x` or, if not `needed`, an empty tensor."""
    return x.new_empty(x.shape if needed else (0,), dtype=dtype or accumulator(x.dtype))


# ---- the hinge with hardest negatives ---------------------------------------------------------------------------

hinge_max = define(
    f"hinge_max({_SIDES}, float margin) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    lambda image, text, image_ids, text_ids, offset, both, margin: (
        _new(image),
        *(
            _new(image, size, dtype=dtype)
            for size in (image.shape[0], text.shape[0] if both else 0)
            for dtype in (torch.int64, torch.bool)
        ),
    ),
    _run("hinge_max_forward", sides=True, need=0),
)
hinge_max_backward = define(
    "hinge_max_backward(Tensor grad, Tensor image, Tensor text, Tensor row_at, Tensor row_active,"
    " Tensor column_at, Tensor column_active, SymInt offset, bool need_image, bool need_text) -> (Tensor, Tensor)",
    lambda grad, image, text, *rest: (
        _like(image, rest[-2], image.dtype),
        _like(text, rest[-1], text.dtype),
    ),
    lambda grad, image, text, *rest: backend(image).hinge_max_backward(
        grad, image, text, Winners(*rest[:4]), rest[4], rest[5:]
    ),
)


def _hinge_max_save(ctx: FunctionCtx, arguments: tuple, outputs: tuple) -> None:
    sides = Sides(*arguments[:_OWN])
    ctx.save_for_backward(sides.image, sides.text, *outputs[1:])
    ctx.offset = sides.offset


def _hinge_max_gradients(ctx: FunctionCtx, grad: Tensor) -> Gradients:
    need = ctx.needs_input_grad
    image, text = hinge_max_backward(grad, *ctx.saved_tensors, ctx.offset, need[0], need[1])
    return image if need[0] else None, text if need[1] else None, *(None,) * (_OWN - 1)


differentiable(hinge_max, _hinge_max_save, _hinge_max_gradients)
no_gradient(hinge_max_backward)

# ---- losses whose gradient is computed in the forward -----------------------------------------------------------

hinge_sum = define(
    f"hinge_sum({_SIDES}, float margin, bool need_image, bool need_text) -> (Tensor, Tensor, Tensor)",
    lambda image, text, *rest: (_new(image), _like(image, rest[-2]), _like(text, rest[-1])),
    _run("hinge_sum_forward", sides=True, need=2),
)
gradient_in_forward(hinge_sum, (0, 1))


def _sigmoid_shapes(image, text, image_ids, text_ids, offset, both, scale, bias, *need):
    inputs = zip((image, text, scale, bias), need, strict=True)
    return _new(image), *(_like(x, needed, accumulator(image.dtype)) for x, needed in inputs)


sigmoid = define(
    f"sigmoid({_SIDES}, Tensor scale, Tensor bias, bool need_image, bool need_text, bool need_scale,"
    " bool need_bias) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _sigmoid_shapes,
    _run("sigmoid_forward", sides=True, need=4),
)
gradient_in_forward(sigmoid, (0, 1, _OWN, _OWN + 1))

relational = define(
    "relational(Tensor student, Tensor teacher, Tensor student_all, Tensor teacher_all, float temperature,"
    " bool need_student, bool need_all) -> (Tensor, Tensor, Tensor)",
    lambda student, teacher, student_all, teacher_all, temperature, *need: (
        _new(student),
        _like(student, need[0]),
        _like(student_all, need[1], accumulator(student.dtype)),
    ),
    _run("relational_forward", sides=False, need=2),
)
gradient_in_forward(relational, (0, 2))

pointwise = define(
    "pointwise(Tensor student, Tensor teacher, str kind, bool normalize, bool need_student) -> (Tensor, Tensor)",
    lambda student, teacher, kind, normalize, need: (_new(student), _like(student, need)),
    _run("pointwise_forward", sides=False, need=0),
)
gradient_in_forward(pointwise, (0,))

# ---- InfoNCE ----------------------------------------------------------------------------------------------------

info_nce = define(
    f"info_nce({_SIDES}, Tensor scale) -> (Tensor, Tensor, Tensor)",
    lambda image, text, image_ids, text_ids, offset, both, scale: (
        _new(image),
        _new(image, image.shape[0]),
        _new(image, text.shape[0] if both else 0),
    ),
    _run("info_nce_forward", sides=True, need=0),
)
# A statistic is a tensor of shape (B,) or (N,), with a number for each row or column. The forward saves it.
info_nce_backward = define(
    f"info_nce_backward({_SIDES}, Tensor scale, Tensor row_statistic, Tensor column_statistic, Tensor grad,"
    " bool need_image, bool need_text, bool need_scale) -> (Tensor, Tensor, Tensor)",
    lambda image, text, image_ids, text_ids, offset, both, scale, *rest: tuple(
        _like(x, needed, x.dtype) for x, needed in zip((image, text, scale), rest[-3:], strict=True)
    ),
    _run("info_nce_backward", sides=True, need=3),
)


def _info_nce_save(ctx: FunctionCtx, arguments: tuple, outputs: tuple) -> None:
    ctx.save_for_backward(*arguments[:4], arguments[_OWN], *outputs[1:])
    ctx.offset_and_both = arguments[4:_OWN]


def _info_nce_gradients(ctx: FunctionCtx, grad: Tensor) -> Gradients:
    need = [ctx.needs_input_grad[k] for k in (0, 1, _OWN)]
    tensors, own = ctx.saved_tensors[:4], ctx.saved_tensors[4:]
    gradients = info_nce_backward(*tensors, *ctx.offset_and_both, *own, grad, *need)
    image, text, scale = (x if needed else None for x, needed in zip(gradients, need, strict=True))
    return image, text, None, None, None, None, scale


differentiable(info_nce, _info_nce_save, _info_nce_gradients)
no_gradient(info_nce_backward)

# ---- GPO --------------------------------------------------------------------------------------------------------


def _gpo_shapes(features, weights, mask, need_features, need_weights):
    batch, tokens, width = features.shape
    sorted_shape = (batch, width * tokens)
    need_value = need_weights and backend(features).gpo_saves_values(features)
    need_order = need_features or (need_weights and not need_value)
    return (
        _new(features, batch, width, dtype=features.dtype),
        _new(features, *(sorted_shape if need_order else (0,)), dtype=position_dtype(tokens)),
        _new(features, *(sorted_shape if need_value else (0,))),
    )


def _gpo_backward_shapes(grad, features, weights, mask, order, value, need_features, need_weights):
    shape = (*mask.shape, grad.shape[1]) if need_features else (0,)
    return _new(grad, *shape, dtype=grad.dtype), _like(weights, need_weights, weights.dtype)


gpo = define(
    "gpo(Tensor features, Tensor weights, Tensor mask, bool need_features, bool need_weights)"
    " -> (Tensor, Tensor, Tensor)",
    _gpo_shapes,
    _run("gpo_forward", sides=False, need=2),
)
gpo_backward = define(
    "gpo_backward(Tensor grad, Tensor features, Tensor weights, Tensor mask, Tensor order, Tensor value,"
    " bool need_features, bool need_weights) -> (Tensor, Tensor)",
    _gpo_backward_shapes,
    _run("gpo_backward", sides=False, need=2),
)


def _gpo_save(ctx: FunctionCtx, arguments: tuple, outputs: tuple) -> None:
    features, weights, mask, need_features, need_weights = arguments
    # If the sorted values are saved, the backward does not need the features, and their memory can be freed.
    read_again = need_weights and outputs[2].numel() == 0
    ctx.save_for_backward(features if read_again else features.new_empty(0), weights, mask, *outputs[1:])
    ctx.need = need_features, need_weights


def _gpo_gradients(ctx: FunctionCtx, grad: Tensor) -> Gradients:
    need = ctx.needs_input_grad[:2]
    if any(needed and not announced for needed, announced in zip(need, ctx.need, strict=True)):
        raise RuntimeError(f"{gpo.name()}: an argument needs a gradient, and its need_... was false")
    features, weights = gpo_backward(grad, *ctx.saved_tensors, *need)
    return features if need[0] else None, weights if need[1] else None, None, None, None


differentiable(gpo, _gpo_save, _gpo_gradients)
no_gradient(gpo_backward)

# ---- ranks ------------------------------------------------------------------------------------------------------


retrieval_ranks = define(
    "retrieval_ranks(Tensor queries, Tensor candidates, Tensor? starts, Tensor? indices, Tensor? query_ids,"
    " Tensor? candidate_ids) -> Tensor",
    lambda queries, *rest: _new(queries, queries.shape[0], dtype=torch.int64),
    lambda queries, candidates, starts, indices, *ids: backend(queries).retrieval_ranks(
        queries, candidates, None if starts is None else (starts, indices), *ids
    ),
)
no_gradient(retrieval_ranks)
