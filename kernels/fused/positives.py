"""Computes the similarities of positive pairs with the same bits as the sweeps, as diagonals of tiles."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from d2s.kernels.fused.launch import INTERPRETED, cdiv, on_device_of, options
from d2s.kernels.fused.spec import KernelSpec
from d2s.kernels.fused.sweep import resident_rows, selected, similarities
from d2s.kernels.fused.tiles import tile_for


@triton.jit(do_not_specialize=("n", "offset"))
def _positives(
    image,  # (B, D)
    text,  # (N, D)
    positive,  # (B,)
    n, offset,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Computes positive[i] = image[i] . text[offset + i] for ROWS rows."""
    lane = tl.arange(0, ROWS)
    row = tl.program_id(0) * ROWS + lane
    inner = tl.minimum(row, n - 1)
    resident = resident_rows(image, inner, WIDTH, DEPTH, UPCAST)
    s = similarities(resident, image, inner, text, inner + offset, WIDTH, DEPTH, UPCAST)
    tl.store(positive + row, selected(s, lane[:, None] == lane[None, :]), mask=row < n)


def positives(image: Tensor, text: Tensor, offset: int) -> Tensor:
    """Returns image[i] . text[offset + i] for each row i, in float32. The inputs must be contiguous."""
    n, width = image.shape
    out = torch.empty(n, dtype=torch.float32, device=image.device)
    tile = tile_for("positives", image)
    with on_device_of(image):
        _positives[(cdiv(n, tile.rows),)](
            image, text, out, n, offset, WIDTH=width, ROWS=tile.rows, DEPTH=tile.depth, UPCAST=INTERPRETED,
            **options(tile),
        )  # fmt: skip
    return out


SPECS = [
    KernelSpec(
        name="positives",
        kernel=_positives,
        pointers={"positive": "*fp32"},
        constants=lambda tile, width, half: {
            "WIDTH": width, "ROWS": tile.rows, "DEPTH": tile.depth, "UPCAST": False
        },
    )
]  # fmt: skip
