"""The variants to compare: our kernels, plain torch code, compiled torch code, and kernels of other projects."""

import os
from collections.abc import Callable
from importlib import import_module
from unittest.mock import patch

import torch
from torch import Tensor

from d2s.kernels.bench.cases import CASES
from d2s.kernels.problems import SCALE, Inputs, Run

# Names of the variants. In each round they run in this order.
PROVIDERS = ("ours", "chunked", "eager", "released", "compiled", "memeff", "inf_cl", "cce_exact", "liger")


class Unavailable(Exception):
    """Raised if a variant does not support a case, or is not installed."""


def provider(name: str, case: str, device: str, width: int) -> Run:
    """Returns the function with which the variant `name` runs a case. Raises Unavailable if it cannot."""
    found = {"ours": CASES[case].ours, "eager": CASES[case].plain, "released": CASES[case].released}
    if name in found:
        if found[name] is None:
            raise Unavailable(f"{name}: public code does it the plain way")
        return found[name]
    if name == "compiled":
        # Dynamo counts how often it compiles a function. Above a limit, it silently runs the function uncompiled.
        # The reset sets the count to 0. With fullgraph, code that cannot be compiled raises an error.
        torch._dynamo.reset()
        return torch.compile(CASES[case].plain, dynamic=False, fullgraph=True)
    if not device.startswith("cuda"):
        raise Unavailable(f"{name}: measured on CUDA only")
    if name == "chunked":
        # The implementation is chosen once in the forward and once in the backward. So both must see the variable.
        chunked = patch.dict(os.environ, D2S_KERNELS="chunked")
        run = chunked(CASES[case].ours)
        run.gradients = chunked(lambda value, inputs: inputs.gradients(value))
        return run
    if case != "info_nce":
        raise Unavailable(f"{name}: symmetric InfoNCE only")
    if name == "inf_cl" and width % 256:
        raise Unavailable(f"{name}: takes multiples of 256 as widths")
    try:
        return _PEERS[name]()
    # A package that was made for another version of torch or triton can raise any exception.
    except Exception as error:
        raise Unavailable(f"{name}: {type(error).__name__}: {error}") from error


def _both(direction: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Run:
    """Returns a variant that computes the mean of the image-to-text and the text-to-image loss.

    direction: computes the loss of one direction from the arguments rows, columns and label. Unlike our loss, the
        variant does not mask pairs of the same image.
    """

    def run(inputs: Inputs) -> Tensor:
        image, text = inputs.tensors["image"], inputs.tensors["text"]
        label = torch.arange(image.shape[0], device=image.device)
        scale = inputs.tensors["scale"].to(image.dtype)
        return (direction(scale * image, text, label) + direction(scale * text, image, label)) / 2

    return run


def _memeff() -> Run:
    loss = import_module("memeff").MemoryEfficientCLIPLoss(temperature=1 / SCALE, normalized_inputs=True)

    def run(inputs: Inputs) -> Tensor:
        # memeff's temperature is a constant. 0 * scale is added so that the scale gets a gradient, as elsewhere.
        value = loss(inputs.tensors["image"], inputs.tensors["text"])
        return value + 0 * inputs.tensors["scale"].sum()

    return run


def _inf_cl() -> Run:
    loss = import_module("inf_cl").cal_flash_loss
    return _both(lambda rows, columns, label: loss(rows, columns, labels=label))


def _cce_exact() -> Run:
    loss = import_module("cut_cross_entropy").linear_cross_entropy
    return _both(lambda rows, columns, label: loss(rows, columns, label, impl="cce_exact", reduction="sum"))


def _liger() -> Run:
    loss = import_module("liger_kernel.transformers").LigerFusedLinearCrossEntropyLoss(reduction="sum")
    return _both(lambda rows, columns, label: loss(columns, rows, label))


_PEERS = {"memeff": _memeff, "inf_cl": _inf_cl, "cce_exact": _cce_exact, "liger": _liger}
