"""Which implementation computes: by the environment, the device and the type.

`D2S_KERNELS` is `triton`, `chunked` or `reference` (dense, float64, slow: for tests and for doubts). Without it:
Triton for CUDA tensors where triton is installed, else chunked. float64 is always chunked, unless the reference
is asked for. Triton on a CPU works in its interpreter alone (TRITON_INTERPRET=1).
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
    """The name of the implementation for tensors of dtype on a device; without one, CUDA where there is CUDA.

    The device need not be there: the answer is the one for machines that have it. Raises ValueError for a device
    or type that torch does not know, and where D2S_KERNELS names none, or one that cannot compute there.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    kind = device.type if isinstance(device, torch.device) else _kind(device)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"dtype: {_short(dtype)} is no type; give one of torch's, e.g. torch.float32")
    return _choose(os.environ.get("D2S_KERNELS") or "", kind, dtype == torch.float64)


def _short(x: object) -> str:
    return repr(x)[:60] if isinstance(x, str | int | float) else f"of type {type(x).__name__}"


def _kind(device: str) -> str:
    """The kind of device that a string names."""
    try:
        if isinstance(device, str):
            return torch.device(device).type
    except RuntimeError:
        pass
    raise ValueError(
        f"device: {_short(device)} is unknown; give a torch.device or its name, e.g. cpu or cuda:0"
    )


def _choose(name: str, kind: str, wide: bool) -> str:
    if name and name not in IMPLEMENTATIONS:
        raise ValueError(f"D2S_KERNELS: {name!r} is unknown; use one of {', '.join(IMPLEMENTATIONS)}")
    if name == "reference":
        return name
    if wide:
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
    """The module of an implementation, logged when it is first used."""
    log.info("kernels: %s", name)
    return import_module(IMPLEMENTATIONS[name])


def backend(x: Tensor) -> ModuleType:
    """The module with the raw functions for tensors like x. The reference has none: its place take the default's."""
    name = os.environ.get("D2S_KERNELS") or ""
    kind = x.device.type
    name = _choose("" if name == "reference" else name, kind, x.dtype == torch.float64)
    if name == "triton" and kind != "cuda" and not _interprets():
        raise ValueError(
            f"TRITON_INTERPRET: set after triton was imported, which now computes on CUDA and not on {kind};"
            " set it before anything is imported"
        )
    return load(name)


def _interprets() -> bool:
    """Whether triton computes in its interpreter, or will: it looks at TRITON_INTERPRET while it is imported."""
    triton = sys.modules.get("triton")
    return triton is None or type(triton.language.cdiv).__name__ == "InterpretedFunction"
