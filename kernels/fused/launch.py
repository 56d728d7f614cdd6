"""What every launch needs: the tensor's device, the options of a tile, and the interpreter's exceptions."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
import triton
from torch import Tensor

from d2s.kernels.fused.tiles import Tile

# Decided when triton is first imported. Its products of 16-bit floats are wrong and its bf16 stores cut bits off.
INTERPRETED = bool(triton.knobs.runtime.interpret)
# Rows swept before the columns' parts are merged, and entries that a merging program owns.
STRIP = 4096
MERGED = 256
# How many programs a sweep is divided into where there are enough columns. A constant and no property of the
# device, because the order in which sums are merged follows from it.
PROGRAMS = 256


def on(x: Tensor) -> AbstractContextManager:
    """The device of x as the current one, where the launch goes to."""
    return torch.cuda.device_of(x) if x.device.type == "cuda" else nullcontext()


def options(tile: Tile) -> dict[str, int]:
    """A tile's launch options."""
    return {"num_warps": tile.warps, "num_stages": tile.stages}


def untiled(tile: Tile, width: int, half: bool) -> dict[str, int]:
    """The options with which Triton launches a kernel that is given none; for a spec."""
    return {"num_warps": 4, "num_stages": 3}


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def whole(size: int, span: int) -> int:
    """size, rounded up to a multiple of span."""
    return cdiv(size, span) * span


def power_of_two(a: int) -> int:
    """The smallest power of two that is no less than a."""
    return 1 << (a - 1).bit_length()


def storage(dtype: torch.dtype) -> torch.dtype:
    """The type in which a kernel stores what is wanted in `dtype`."""
    return torch.float32 if INTERPRETED and dtype == torch.bfloat16 else dtype


def total(partials: Tensor) -> Tensor:
    """The sum of (P,), 0-dim; without a launch where there is one."""
    return partials.reshape(()) if partials.numel() == 1 else partials.sum()


def nothing(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """What stands for a result that nobody asked for: no entries."""
    return like.new_empty(0, dtype=dtype or like.dtype)


class Strips:
    """How a forward sweep is divided: strips of rows one after the other; in each, blocks x splits programs.

    n rows, m columns. rows: of a strip, whole tiles where another follows. splits ranges of `tiles` tiles of
    columns. `merging` programs follow each strip; columns says whether they have columns to merge, too.
    """

    def __init__(self, n: int, m: int, tile: Tile, columns: bool) -> None:
        self.n, self.tile = n, tile
        # A tile that reached beyond its strip would write over the next range's parts.
        self.rows = min(n, whole(STRIP, tile.rows))
        self.blocks = cdiv(self.rows, tile.rows)
        column_tiles = cdiv(m, tile.columns)
        self.tiles = cdiv(column_tiles, min(column_tiles, cdiv(PROGRAMS, self.blocks)))
        self.splits = cdiv(column_tiles, self.tiles)
        self.merging = cdiv(max(self.rows, m if columns else 0), MERGED)
        self.row_parts, self.column_parts = self.splits * self.rows, self.blocks * m if columns else 0
        self.losses = cdiv(n, self.rows) * self.merging

    def __iter__(self) -> Iterator[tuple[int, int, int, int]]:
        """Yields (start, stop, blocks, where the strip's losses begin)."""
        for k, start in enumerate(range(0, self.n, self.rows)):
            stop = min(start + self.rows, self.n)
            yield start, stop, cdiv(stop - start, self.tile.rows), k * self.merging
