"""Helps to launch kernels: sets the current device, chooses options and constants, and divides sweeps."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
import triton
from torch import Tensor

from d2s.kernels.fused.tiles import Tile

# Whether kernels run in Triton's interpreter. Its products of 16-bit floats are wrong. Its stores of bf16
# truncate. Triton reads TRITON_INTERPRET when it is imported.
INTERPRETED = bool(triton.knobs.runtime.interpret)
# STRIP: rows that are swept before the partial results of the columns are merged. MERGED: rows (or columns)
# that one merging program computes.
STRIP = 4096
MERGED = 256
# Number of programs in a sweep, if there are enough columns. It must be the same on every device, because it
# sets the order in which partial sums are merged.
PROGRAMS = 256


def on_device_of(x: Tensor) -> AbstractContextManager:
    """Returns a context in which kernels are launched on the device of x."""
    return torch.cuda.device_of(x) if x.device.type == "cuda" else nullcontext()


def options(tile: Tile) -> dict[str, int]:
    """Returns Triton's launch options for `tile`."""
    return {"num_warps": tile.warps, "num_stages": tile.stages}


def untiled(tile: Tile, width: int, half: bool) -> dict[str, int]:
    """Returns Triton's default launch options, for the KernelSpec of a kernel launched without options."""
    return {"num_warps": 4, "num_stages": 3}


# KernelSpec fields of a kernel that merges partial results. It reads no embeddings, so one build is enough.
MERGE = {"dots": False, "options": untiled, "dtypes": ("fp32",), "widths": (64,)}


def tile_constants(tile: Tile, width: int, upcast: bool = False) -> dict[str, object]:
    """Returns the constants of a kernel that computes tiles of similarities (see `sweep.py`)."""
    sizes = {"WIDTH": width, "ROWS": tile.rows, "COLUMNS": tile.columns, "DEPTH": tile.depth}
    return {**sizes, "UPCAST": upcast}


def cdiv(a: int, b: int) -> int:
    """Returns a / b, rounded up."""
    return -(-a // b)


def round_up(size: int, span: int) -> int:
    """Returns the smallest multiple of `span` that is at least `size`."""
    return cdiv(size, span) * span


def power_of_two(a: int) -> int:
    """Returns the smallest power of two that is at least a."""
    return 1 << (a - 1).bit_length()


def storage(dtype: torch.dtype) -> torch.dtype:
    """Returns the type in which a kernel stores a result of type `dtype`."""
    return torch.float32 if INTERPRETED and dtype == torch.bfloat16 else dtype


def total(partials: Tensor) -> Tensor:
    """Returns the sum of `partials`, of shape (). Launches no kernel if there is only one partial."""
    return partials.reshape(()) if partials.numel() == 1 else partials.sum()


def not_needed(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Returns an empty tensor on the device of `like`, for a result that the caller does not need."""
    return like.new_empty(0, dtype=dtype or like.dtype)


class Strips:
    """Divides a forward sweep over n rows and m columns into strips of rows.

    Strips of `rows` rows are processed one after the other. `blocks` x `splits` programs sweep a strip. Each
    program takes one tile of rows and `tiles` tiles of columns. Then `merging` programs merge the results of
    the rows and, if `columns` is true, of the columns.
    """

    def __init__(self, n: int, m: int, tile: Tile, columns: bool) -> None:
        self.n, self.tile = n, tile
        # The size must be a multiple of the tile. A tile that crosses the strip's end would overwrite results
        # of the next split.
        self.rows = min(n, round_up(STRIP, tile.rows))
        self.blocks = cdiv(self.rows, tile.rows)
        column_tiles = cdiv(m, tile.columns)
        self.tiles = cdiv(column_tiles, min(column_tiles, cdiv(PROGRAMS, self.blocks)))
        self.splits = cdiv(column_tiles, self.tiles)
        self.merging = cdiv(max(self.rows, m if columns else 0), MERGED)
        self.row_parts, self.column_parts = self.splits * self.rows, self.blocks * m if columns else 0
        self.losses = cdiv(n, self.rows) * self.merging

    def __iter__(self) -> Iterator[tuple[int, int, int, int]]:
        """Yields (start, stop, number of blocks, index of the first partial loss) for each strip of rows."""
        for k, start in enumerate(range(0, self.n, self.rows)):
            stop = min(start + self.rows, self.n)
            yield start, stop, cdiv(stop - start, self.tile.rows), k * self.merging
