"""The kernels as operators `d2s::...` of torch: what they take, which shapes they give, who computes, gradients.

An operator's run is opaque to `torch.compile`, so that it computes the same bits there. Those whose gradient is made
in the forward sweep return it beside the loss, in the accumulator's type (float32; float64 for float64); which ones
to make, the need_... arguments say, and what is not needed is empty. The others have a second operator for their
backward. Argument names are those of `d2s.kernels.functional`, where they are checked.
"""

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from d2s.kernels.operators.dispatch import backend
from d2s.kernels.operators.define import (
    Gradients,
    define,
    differentiable,
    made_in_forward,
    no_gradient,
    place_type,
)

_SIDES = "Tensor image, Tensor text, Tensor image_ids, Tensor text_ids"


def _accumulator(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _new(like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    return like.new_empty(shape, dtype=dtype or _accumulator(like))


def _like(x: Tensor, needed: bool, dtype: torch.dtype | None = None) -> Tensor:
    """Contiguous, in the shape of x or empty."""
    return x.new_empty(x.shape if needed else (0,), dtype=dtype or _accumulator(x))


# ---- the hinge: hardest negatives -------------------------------------------------------------------------------


def _hinge_max_shapes(image, text, image_ids, text_ids, margin, offset, both):
    n, m = image.shape[0], text.shape[0] if both else 0
    whole, truth = torch.int64, torch.bool
    return (
        _new(image),
        _new(image, n, dtype=whole),
        _new(image, n, dtype=truth),
        _new(image, m, dtype=whole),
        _new(image, m, dtype=truth),
    )


hinge_max = define(
    f"hinge_max({_SIDES}, float margin, SymInt offset, bool both) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _hinge_max_shapes,
    lambda image, *rest: backend(image).hinge_max_forward(image, *rest),
)
hinge_max_backward = define(
    "hinge_max_backward(Tensor grad, Tensor image, Tensor text, Tensor row_at, Tensor row_active,"
    " Tensor column_at, Tensor column_active, SymInt offset, bool need_image, bool need_text) -> (Tensor, Tensor)",
    lambda grad, image, text, *rest: (
        _like(image, rest[-2], image.dtype),
        _like(text, rest[-1], text.dtype),
    ),
    lambda grad, image, *rest: backend(image).hinge_max_backward(grad, image, *rest),
)


def _hinge_max_save(ctx: FunctionCtx, arguments: tuple, outputs: tuple) -> None:
    ctx.save_for_backward(*arguments[:2], *outputs[1:])
    ctx.offset = arguments[5]


def _hinge_max_gradients(ctx: FunctionCtx, grad: Tensor) -> Gradients:
    need = ctx.needs_input_grad
    image, text = hinge_max_backward(grad, *ctx.saved_tensors, ctx.offset, need[0], need[1])
    return image if need[0] else None, text if need[1] else None, None, None, None, None, None


differentiable(hinge_max, _hinge_max_save, _hinge_max_gradients)
no_gradient(hinge_max_backward)

# ---- the hinge: all violations; sigmoid; distillation: gradients are made in the forward ------------------------

hinge_sum = define(
    f"hinge_sum({_SIDES}, float margin, SymInt offset, bool both, bool need_image, bool need_text)"
    " -> (Tensor, Tensor, Tensor)",
    lambda image, text, *rest: (_new(image), _like(image, rest[-2]), _like(text, rest[-1])),
    lambda image, *rest: backend(image).hinge_sum_forward(image, *rest),
)
made_in_forward(hinge_sum, (0, 1))


def _sigmoid_shapes(image, text, image_ids, text_ids, scale, bias, offset, *need):
    made = zip((image, text, scale, bias), need, strict=True)
    return _new(image), *(_like(x, needed, _accumulator(image)) for x, needed in made)


sigmoid = define(
    f"sigmoid({_SIDES}, Tensor scale, Tensor bias, SymInt offset, bool need_image, bool need_text,"
    " bool need_scale, bool need_bias) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _sigmoid_shapes,
    lambda image, *rest: backend(image).sigmoid_forward(image, *rest),
)
made_in_forward(sigmoid, (0, 1, 4, 5))

relational = define(
    "relational(Tensor student, Tensor teacher, Tensor student_all, Tensor teacher_all, float temperature,"
    " bool need_student, bool need_all) -> (Tensor, Tensor, Tensor)",
    lambda student, teacher, student_all, teacher_all, temperature, *need: (
        _new(student),
        _like(student, need[0]),
        _like(student_all, need[1], _accumulator(student)),
    ),
    lambda student, *rest: backend(student).relational_forward(student, *rest),
)
made_in_forward(relational, (0, 2))

pointwise = define(
    "pointwise(Tensor student, Tensor teacher, str kind, bool normalize, bool need_student) -> (Tensor, Tensor)",
    lambda student, teacher, kind, normalize, need: (_new(student), _like(student, need)),
    lambda student, *rest: backend(student).pointwise_forward(student, *rest),
)
made_in_forward(pointwise, (0,))

# ---- InfoNCE ----------------------------------------------------------------------------------------------------

info_nce = define(
    f"info_nce({_SIDES}, Tensor scale, SymInt offset, bool both) -> (Tensor, Tensor, Tensor)",
    lambda image, text, image_ids, text_ids, scale, offset, both: (
        _new(image),
        _new(image, image.shape[0]),
        _new(image, text.shape[0] if both else 0),
    ),
    lambda image, *rest: backend(image).info_nce_forward(image, *rest),
)
info_nce_backward = define(
    f"info_nce_backward(Tensor grad, {_SIDES}, Tensor scale, Tensor row_lse, Tensor column_lse, SymInt offset,"
    " bool both, bool need_image, bool need_text, bool need_scale) -> (Tensor, Tensor, Tensor)",
    lambda grad, image, text, image_ids, text_ids, scale, *rest: tuple(
        _like(x, needed, x.dtype) for x, needed in zip((image, text, scale), rest[-3:], strict=True)
    ),
    lambda grad, image, *rest: backend(image).info_nce_backward(grad, image, *rest),
)


def _info_nce_save(ctx: FunctionCtx, arguments: tuple, outputs: tuple) -> None:
    ctx.save_for_backward(*arguments[:5], *outputs[1:])
    ctx.options = arguments[5:]


def _info_nce_gradients(ctx: FunctionCtx, grad: Tensor) -> Gradients:
    need = [ctx.needs_input_grad[k] for k in (0, 1, 4)]
    made = info_nce_backward(grad, *ctx.saved_tensors, *ctx.options, *need)
    image, text, scale = (x if needed else None for x, needed in zip(made, need, strict=True))
    return image, text, None, None, scale, None, None


differentiable(info_nce, _info_nce_save, _info_nce_gradients)
no_gradient(info_nce_backward)

# ---- GPO --------------------------------------------------------------------------------------------------------


def _gpo_shapes(features, weights, mask, need_features, need_weights):
    batch, tokens, width = features.shape
    kept = (batch, width * tokens)
    need_value = need_weights and backend(features).gpo_keeps_values(features)
    need_order = need_features or (need_weights and not need_value)
    return (
        _new(features, batch, width, dtype=features.dtype),
        _new(features, *(kept if need_order else (0,)), dtype=place_type(tokens)),
        _new(features, *(kept if need_value else (0,))),
    )


def _gpo_backward_shapes(grad, features, weights, mask, order, value, need_features, need_weights):
    shape = (*mask.shape, grad.shape[1]) if need_features else (0,)
    return _new(grad, *shape, dtype=grad.dtype), _like(weights, need_weights, weights.dtype)


def _gpo_backward(grad, *rest):
    return backend(grad).gpo_backward(grad, *rest)


gpo = define(
    "gpo(Tensor features, Tensor weights, Tensor mask, bool need_features, bool need_weights)"
    " -> (Tensor, Tensor, Tensor)",
    _gpo_shapes,
    lambda features, *rest: backend(features).gpo_forward(features, *rest),
)
gpo_backward = define(
    "gpo_backward(Tensor grad, Tensor features, Tensor weights, Tensor mask, Tensor order, Tensor value,"
    " bool need_features, bool need_weights) -> (Tensor, Tensor)",
    _gpo_backward_shapes,
    _gpo_backward,
)


def _gpo_save(ctx: FunctionCtx, arguments: tuple, outputs: tuple) -> None:
    features, weights, mask, need_features, need_weights = arguments
    # Who keeps the sorted values does not read the features again: they may be freed.
    again = features if need_weights and outputs[2].numel() == 0 else features.new_empty(0)
    ctx.save_for_backward(again, weights, mask, *outputs[1:])
    ctx.needs = need_features, need_weights


def _gpo_gradients(ctx: FunctionCtx, grad: Tensor) -> Gradients:
    need = ctx.needs_input_grad[:2]
    if any(needed and not made for needed, made in zip(need, ctx.needs, strict=True)):
        raise RuntimeError(f"{gpo.name()}: an argument needs a gradient, and its need_... was false")
    features, weights = gpo_backward(grad, *ctx.saved_tensors, *need)
    return features if need[0] else None, weights if need[1] else None, None, None, None


differentiable(gpo, _gpo_save, _gpo_gradients)
no_gradient(gpo_backward)

# ---- ranks ------------------------------------------------------------------------------------------------------


def _ranks(queries, candidates, starts, indices, query_ids, candidate_ids):
    positives = None if starts is None else (starts, indices)
    return backend(queries).retrieval_ranks(queries, candidates, positives, query_ids, candidate_ids)


retrieval_ranks = define(
    "retrieval_ranks(Tensor queries, Tensor candidates, Tensor? starts, Tensor? indices, Tensor? query_ids,"
    " Tensor? candidate_ids) -> Tensor",
    lambda queries, *rest: _new(queries, queries.shape[0], dtype=torch.int64),
    _ranks,
)
no_gradient(retrieval_ranks)
