"""Who is measured: ours, the plain way, the plain way compiled, and other people's kernels where installed."""

import os
from collections.abc import Callable
from contextlib import contextmanager
from importlib import import_module

import torch
from torch import Tensor

from d2s.kernels.bench.cases import CASES, SCALE, Inputs, Run

# Named on the command line and in the results, in the order in which they take turns.
PROVIDERS = ("ours", "chunked", "eager", "released", "compiled", "memeff", "inf_cl", "cce_exact", "liger")


class Unavailable(Exception):
    """This provider has nothing for this case, or is not installed."""


def provider(name: str, case: str, device: str, width: int) -> Run:
    """How that provider runs a case. Raises Unavailable with the reason."""
    if name == "ours":
        return CASES[case].ours
    if name == "eager":
        return CASES[case].plain
    if name == "released":
        if CASES[case].released is None:
            raise Unavailable(f"{name}: public code has it the plain way")
        return CASES[case].released
    if name == "compiled":
        return _compiled(CASES[case].plain)
    if not device.startswith("cuda"):
        raise Unavailable(f"{name}: measured on CUDA only")
    if name == "chunked":
        return _Chunked(CASES[case].ours)
    if case != "info_nce":
        raise Unavailable(f"{name}: symmetric InfoNCE only")
    if name == "inf_cl" and width % 256:
        raise Unavailable(f"{name}: takes widths that 256 divides")
    return _PEERS[name]()


def _compiled(plain: Run) -> Run:
    """Compiled for every size anew, or an error: what cannot be compiled must not be timed under this name.

    Dynamo counts recompilations by code object, which sizes, types and both hinges share; past its limit it runs
    the function as it is, and says nothing.
    """
    torch._dynamo.reset()
    return torch.compile(plain, dynamic=False, fullgraph=True)


class _Chunked:
    """Ours by the chunked implementation: the environment chooses it when forward runs and when backward does."""

    def __init__(self, ours: Run) -> None:
        self.ours = ours

    def __call__(self, inputs: Inputs) -> Tensor:
        with _environment("D2S_KERNELS", "chunked"):
            return self.ours(inputs)

    def gradients(self, value: Tensor, inputs: Inputs) -> tuple[Tensor, ...]:
        with _environment("D2S_KERNELS", "chunked"):
            return torch.autograd.grad(value, inputs.leaves, inputs.upstream)


@contextmanager
def _environment(name: str, value: str):
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before


def _name_of(module: str, name: str) -> Callable:
    try:
        return getattr(import_module(module), name)
    # A package for another version of torch or triton fails in many ways; all mean that it cannot be measured.
    except Exception as error:
        raise Unavailable(f"{module}: {type(error).__name__}: {error}") from error


def _twice(direction: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Run:
    """Both directions of a loss that goes by rows; the peers know no same-image pairs and take every other one."""

    def run(inputs: Inputs) -> Tensor:
        image, text = inputs.tensors["image"], inputs.tensors["text"]
        label = torch.arange(image.shape[0], device=image.device)
        scale = inputs.tensors["scale"].to(image.dtype)
        return (direction(scale * image, text, label) + direction(scale * text, image, label)) / 2

    return run


def _memeff() -> Run:
    loss = _name_of("memeff", "MemoryEfficientCLIPLoss")(temperature=1 / SCALE, normalized_inputs=True)

    def run(inputs: Inputs) -> Tensor:
        # Its temperature is a number: the loss still depends on the scale, by zero, so that all have a gradient.
        value = loss(inputs.tensors["image"], inputs.tensors["text"])
        return value + 0 * inputs.tensors["scale"].sum()

    return run


def _inf_cl() -> Run:
    loss = _name_of("inf_cl", "cal_flash_loss")

    def direction(rows: Tensor, columns: Tensor, label: Tensor) -> Tensor:
        return loss(rows, columns, labels=label)

    return _twice(direction)


def _cce_exact() -> Run:
    loss = _name_of("cut_cross_entropy", "linear_cross_entropy")

    def direction(rows: Tensor, columns: Tensor, label: Tensor) -> Tensor:
        return loss(rows, columns, label, impl="cce_exact", reduction="sum")

    return _twice(direction)


def _liger() -> Run:
    loss = _name_of("liger_kernel.transformers", "LigerFusedLinearCrossEntropyLoss")(reduction="sum")

    def direction(rows: Tensor, columns: Tensor, label: Tensor) -> Tensor:
        return loss(columns, rows, label)

    return _twice(direction)


_PEERS = {"memeff": _memeff, "inf_cl": _inf_cl, "cce_exact": _cce_exact, "liger": _liger}
