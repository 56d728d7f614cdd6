"""Helpers for launching kernels: the current device, options and constants, the division of a sweep."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
import triton
from torch import Tensor

from d2s.kernels.fused.tiles import Tile

# Triton decides this when it is imported. In the interpreter, products of 16-bit floats are wrong, and stores
# of bf16 truncate.
INTERPRETED = bool(triton.knobs.runtime.interpret)
# STRIP: rows swept before the columns' partial results are merged. MERGED: entries that a merging program
# computes.
STRIP = 4096
MERGED = 256
# Programs that a sweep is divided into if there are enough columns. The number is the same on every device,
# because it sets the order in which partial sums are merged.
PROGRAMS = 256


def on_device_of(x: Tensor) -> AbstractContextManager:
    """Returns a context in which the device of x is the current device, to which kernels are launched."""
    return torch.cuda.device_of(x) if x.device.type == "cuda" else nullcontext()


def options(tile: Tile) -> dict[str, int]:
    """Returns the launch options of a tile."""
    return {"num_warps": tile.warps, "num_stages": tile.stages}


def untiled(tile: Tile, width: int, half: bool) -> dict[str, int]:
    """Returns Triton's default launch options, for the spec of a kernel that is launched without options."""
    return {"num_warps": 4, "num_stages": 3}


# Of the spec of a kernel that merges partial results: it sees no embeddings, so one build serves all of them.
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
    """Returns the sum of partials (P,), 0-dim; launches no kernel for P = 1."""
    return partials.reshape(()) if partials.numel() == 1 else partials.sum()


def not_needed(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Returns an empty tensor, in place of a result that is not needed."""
    return like.new_empty(0, dtype=dtype or like.dtype)


class Strips:
    """Divides a forward sweep over n rows and m columns.

    The rows are processed in strips of `rows` rows, one after the other. `blocks` x `splits` programs sweep a
    strip; each takes one tile of rows and `tiles` tiles of columns. Then `merging` programs merge the results
    of the rows and, if `columns` is true, of the columns.
    """

    def __init__(self, n: int, m: int, tile: Tile, columns: bool) -> None:
        self.n, self.tile = n, tile
        # A multiple of the tile, because a tile that crosses the strip's end would overwrite results of the
        # next split.
        self.rows = min(n, round_up(STRIP, tile.rows))
        self.blocks = cdiv(self.rows, tile.rows)
        column_tiles = cdiv(m, tile.columns)
        self.tiles = cdiv(column_tiles, min(column_tiles, cdiv(PROGRAMS, self.blocks)))
        self.splits = cdiv(column_tiles, self.tiles)
        self.merging = cdiv(max(self.rows, m if columns else 0), MERGED)
        self.row_parts, self.column_parts = self.splits * self.rows, self.blocks * m if columns else 0
        self.losses = cdiv(n, self.rows) * self.merging

    def __iter__(self) -> Iterator[tuple[int, int, int, int]]:
        """Yields (start, stop, blocks, index of the first partial loss) of each strip."""
        for k, start in enumerate(range(0, self.n, self.rows)):
            stop = min(start + self.rows, self.n)
            yield start, stop, cdiv(stop - start, self.tile.rows), k * self.merging
