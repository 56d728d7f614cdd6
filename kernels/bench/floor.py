"""The least work of an op, and the time that it takes at a device's ceilings."""

from dataclasses import dataclass

import torch

from d2s.kernels.bench.cases import CASES, Shape


@dataclass(frozen=True, kw_only=True)
class Work:
    """Floating-point operations of matrix products, and bytes read and written once, of one step."""

    flops: float
    traffic: float

    def floor_ms(self, matmul_tflops: float, copy_gbs: float) -> float:
        """Milliseconds: the slower of the two at its ceiling."""
        return max(self.flops / matmul_tflops / 1e9, self.traffic / copy_gbs / 1e6)


def work(case: str, shape: Shape, dtype: torch.dtype, mode: str) -> Work:
    """The least work of a mode: what backward has to do is what both have to, less the forward's share."""
    kind = CASES[case]
    (flops, both_flops), (traffic, both_traffic) = kind.flops, kind.traffic
    if mode == "full":
        flops, traffic = both_flops, both_traffic
    elif mode == "backward":
        flops, traffic = both_flops - flops, both_traffic - traffic
    entries = shape.n * shape.width * max(shape.tokens, 1)
    return Work(
        flops=float(flops * shape.n * shape.n * shape.width),
        traffic=float(traffic * entries * dtype.itemsize),
    )
