"""Defines torch operators with their schemas, output shapes, computations and gradients.

This module uses `torch.library.Library` and registers its own autograd kernels. `register_autograd` and
`torch.library.custom_op` would cost about 20 us more per call, which matters at a batch of 128.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

Gradients = tuple[Tensor | None, ...]
_LIBRARY = torch.library.Library("d2s", "FRAGMENT")
_BelowAutograd = torch._C._AutoDispatchBelowAutograd
_NO_SECOND = (
    "{}: its gradient was to be differentiated (create_graph=True), and it has no second derivative; "
    "D2S_KERNELS=reference has"
)


def define(schema: str, fake: Callable, run: Callable) -> Callable:
    """Defines the operator that `schema` describes and returns the operator.

    fake: returns uninitialised outputs of the right shapes and types, for torch.compile.
    run: computes the outputs. The operator passes detached tensors to it.
    """
    name = schema.partition("(")[0]

    def detached(*arguments: object) -> object:
        return run(*(x.detach() if isinstance(x, Tensor) else x for x in arguments))

    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, detached, "CompositeExplicitAutograd")
    torch.library.register_fake(f"d2s::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.d2s, name).default


def differentiable(operator: Callable, save: Callable, backward: Callable) -> None:
    """Registers the gradient of an operator with several outputs. Only the first output has a gradient.

    `save(ctx, arguments, outputs)` keeps tensors for the backward. `backward(ctx, grad)` returns the gradients of the
    arguments, given the gradient of the first output. `backward` is not called if this output gets no gradient.
    """

    def forward(ctx: FunctionCtx, *arguments: object) -> object:
        with _BelowAutograd():
            outputs = operator(*arguments)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*outputs[1:])
        save(ctx, arguments, outputs)
        return outputs

    def once(ctx: FunctionCtx, grad: Tensor | None, *_: None) -> Gradients:
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        refuse_second_derivative(operator.name())
        return backward(ctx, grad)

    _register(operator, forward, once)


def no_gradient(operator: Callable) -> None:
    """Registers a backward that raises RuntimeError, for operators whose outputs are gradients or integers."""

    def forward(ctx: FunctionCtx, *arguments: object) -> object:
        with _BelowAutograd():
            return operator(*arguments)

    def refuse(ctx: FunctionCtx, *_: object) -> Gradients:
        raise RuntimeError(_NO_SECOND.format(operator.name()))

    _register(operator, forward, refuse)


def _register(operator: Callable, forward: Callable, backward: Callable) -> None:
    """Registers `forward` and `backward` as the operator's autograd kernel, which runs only in grad mode."""
    name = operator.name().replace("::", "_")
    members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    function = type(name, (torch.autograd.Function,), members)

    def autograd_kernel(*arguments: object) -> object:
        if torch.is_grad_enabled():
            return function.apply(*arguments)
        with _BelowAutograd():
            return operator(*arguments)

    _LIBRARY.impl(operator.name().partition("::")[2], autograd_kernel, "Autograd")


def refuse_second_derivative(name: str) -> None:
    """Raises RuntimeError if the backward that calls this function runs under create_graph=True.

    name: the operator's name, for the message. torch's `once_differentiable` raises only while the second
    derivative is computed. Autograd may skip this computation, depending on the leaves that it must differentiate.
    The second derivative would then be zero without an error. So the error must be raised in the first backward.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(_NO_SECOND.format(name))


def gradient_in_forward(operator: Callable, places: tuple[int, ...]) -> None:
    """Registers the gradient of an operator that returns the loss and its gradients.

    places: for each returned gradient, the index of the argument to which the gradient belongs.
    """

    def save(ctx: FunctionCtx, arguments: tuple, outputs: tuple) -> None:
        ctx.save_for_backward(*outputs[1:])
        ctx.types = [arguments[k].dtype for k in places]

    def backward(ctx: FunctionCtx, grad: Tensor) -> Gradients:
        gradients: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
        for k, saved, dtype in zip(places, ctx.saved_tensors, ctx.types, strict=True):
            if not ctx.needs_input_grad[k]:
                continue
            if saved.numel() == 0:
                raise RuntimeError(
                    f"{operator.name()}: argument {k} needs a gradient, and its need_... was false"
                )
            gradients[k] = (grad * saved).to(dtype)
        return tuple(gradients)

    differentiable(operator, save, backward)
