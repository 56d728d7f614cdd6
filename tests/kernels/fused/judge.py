"""When a kernel is right: no further from float64 than twice plain torch in the inputs' own type."""

import torch
from problems import Numbers
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def assert_as_good(
    ours: Tensor, dense: Tensor, exact: Tensor, eps: float = 1e-6, least: float = 1e-3
) -> None:
    """Largest and root mean square error against exact: at most twice those of dense, and eps of the size.

    least: the size below which a result is the difference of larger terms.
    """
    assert ours.shape == exact.shape
    exact = exact.double()
    room = eps * max(least, float(exact.abs().max()))
    error, plain = (ours.double() - exact), (dense.double() - exact)
    assert not error.isnan().any()
    assert float(error.abs().max()) <= 2 * float(plain.abs().max()) + room
    assert float(error.square().mean().sqrt()) <= 2 * float(plain.square().mean().sqrt()) + room


def spread(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers in dtype."""
    g = Numbers(seed)
    return g.randn(shape, dtype=torch.float64).to(dtype)


def strided(x: Tensor) -> Tensor:
    """The same entries in another order of memory, with gaps."""
    wide = torch.stack([x, x + 1], -1)
    out = wide.transpose(0, 1).contiguous().transpose(0, 1)[..., 0]
    assert torch.equal(out, x)
    return out


def slope(function, x: Tensor, direction: Tensor, step: float) -> float:
    """The derivative of function at x along direction, by central differences."""
    plus, minus = function(x + step * direction), function(x - step * direction)
    return (float(plus) - float(minus)) / (2 * step)
