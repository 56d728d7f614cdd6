"""Chooses the implementation of the kernels from the environment, the device and the type of the tensors.

The variable `D2S_KERNELS` is `triton`, `chunked` or `reference`. The reference is dense, uses float64 and is slow.
It is for tests, or to check a result. If the variable is not set, CUDA tensors use `triton` if triton is installed.
All other tensors use `chunked`. float64 tensors use `chunked`, unless `D2S_KERNELS` is `reference`. On a CPU,
`triton` needs Triton's interpreter (TRITON_INTERPRET=1).
"""

import logging
import os
import sys
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

IMPLEMENTATIONS = {
    "triton": "d2s.kernels.fused",
    "chunked": "d2s.kernels.chunked",
    "reference": "d2s.kernels.reference",
}
log = logging.getLogger("d2s.kernels")


def implementation(device: torch.device | str | None = None, dtype: torch.dtype = torch.float32) -> str:
    """Returns the name of the implementation for tensors of `dtype` on `device`.

    `device` need not exist on this machine. The default is CUDA if it is available, else the CPU. Raises ValueError
    for an unknown device or type, and if D2S_KERNELS is unknown or cannot compute on this device.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(device).type
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"device: {device!r} is unknown; give a torch.device or its name, e.g. cpu or cuda:0"
        ) from error
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"dtype: {dtype!r} is not a type; give one of torch's, e.g. torch.float32")
    return _choose(os.environ.get("D2S_KERNELS") or "", kind, dtype)


def uses_reference(x: Tensor) -> bool:
    """Returns whether the reference is chosen for tensors like `x`. The caller skips the torch operators if so."""
    return _choose(os.environ.get("D2S_KERNELS") or "", x.device.type, x.dtype) == "reference"


def _choose(name: str, kind: str, dtype: torch.dtype) -> str:
    """Returns the implementation's name. name: the value of D2S_KERNELS, or "". kind: the type of the device."""
    if name and name not in IMPLEMENTATIONS:
        raise ValueError(f"D2S_KERNELS: {name!r} is unknown; use one of {', '.join(IMPLEMENTATIONS)}")
    if name == "reference":
        return name
    if dtype == torch.float64:
        return "chunked"
    if not name:
        return "triton" if kind == "cuda" and _has_triton() else "chunked"
    if name == "triton" and kind != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"D2S_KERNELS: triton computes on CUDA, not on {kind}, unless TRITON_INTERPRET=1 is set"
        )
    return name


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


@cache
def load(name: str) -> ModuleType:
    """Imports and returns the module of the implementation `name`. Logs the name at the first import."""
    log.info("kernels: %s", name)
    return import_module(IMPLEMENTATIONS[name])


def backend(x: Tensor) -> ModuleType:
    """Returns the module that operators use for tensors like `x`. D2S_KERNELS=reference counts as not set."""
    name = os.environ.get("D2S_KERNELS") or ""
    kind = x.device.type
    name = _choose("" if name == "reference" else name, kind, x.dtype)
    if name == "triton" and kind != "cuda" and not _interprets():
        raise ValueError(
            f"TRITON_INTERPRET: set after triton was imported, which now computes on CUDA and not on {kind};"
            " set it before anything is imported"
        )
    return load(name)


def _interprets() -> bool:
    """Returns True if triton is imported and uses its interpreter, or if triton is not imported yet."""
    triton = sys.modules.get("triton")
    return triton is None or type(triton.language.cdiv).__name__ == "InterpretedFunction"
