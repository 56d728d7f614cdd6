"""What every launch needs: the tensor's device, a tile's options and constants, how a sweep is divided."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
import triton
from torch import Tensor

from d2s.kernels.fused.tiles import Tile

# Decided when triton is imported. The interpreter's products of 16-bit floats are wrong, and its bf16 stores
# truncate.
INTERPRETED = bool(triton.knobs.runtime.interpret)
# Rows swept before the columns' partial results are merged, and entries that a merging program owns.
STRIP = 4096
MERGED = 256
# Programs that a sweep is divided into if there are enough columns. The same on every device, because the order in
# which partial sums are merged depends on it.
PROGRAMS = 256


def on_device_of(x: Tensor) -> AbstractContextManager:
    """A context with the device of x as the current one, to which launches go."""
    return torch.cuda.device_of(x) if x.device.type == "cuda" else nullcontext()


def options(tile: Tile) -> dict[str, int]:
    """A tile's launch options."""
    return {"num_warps": tile.warps, "num_stages": tile.stages}


def untiled(tile: Tile, width: int, half: bool) -> dict[str, int]:
    """Triton's default launch options, for the spec of a kernel that is launched without any."""
    return {"num_warps": 4, "num_stages": 3}


# Of the spec of a kernel that merges partial results: it sees no embeddings, so one build serves all of them.
MERGE = {"dots": False, "options": untiled, "dtypes": ("fp32",), "widths": (64,)}


def tile_constants(tile: Tile, width: int, upcast: bool = False) -> dict[str, object]:
    """The constants of a kernel that makes tiles of similarities, see `sweep.py`."""
    sizes = {"WIDTH": width, "ROWS": tile.rows, "COLUMNS": tile.columns, "DEPTH": tile.depth}
    return {**sizes, "UPCAST": upcast}


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def round_up(size: int, span: int) -> int:
    """The smallest multiple of span that is at least size."""
    return cdiv(size, span) * span


def power_of_two(a: int) -> int:
    """The smallest power of two that is at least a."""
    return 1 << (a - 1).bit_length()


def storage(dtype: torch.dtype) -> torch.dtype:
    """The type in which a kernel stores a result of type `dtype`."""
    return torch.float32 if INTERPRETED and dtype == torch.bfloat16 else dtype


def total(partials: Tensor) -> Tensor:
    """The sum of partials (P,), 0-dim; without a launch for P = 1."""
    return partials.reshape(()) if partials.numel() == 1 else partials.sum()


def not_needed(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor without entries, in place of a result that is not needed."""
    return like.new_empty(0, dtype=dtype or like.dtype)


class Strips:
    """How a forward sweep over n rows and m columns is divided.

    Strips of `rows` rows follow one another. Each is swept by `blocks` x `splits` programs, a program taking one
    tile of rows and `tiles` tiles of columns, and then merged by `merging` programs. columns: whether those merge
    columns too.
    """

    def __init__(self, n: int, m: int, tile: Tile, columns: bool) -> None:
        self.n, self.tile = n, tile
        # A multiple of the tile: a tile beyond its strip would overwrite partial results of the next range.
        self.rows = min(n, round_up(STRIP, tile.rows))
        self.blocks = cdiv(self.rows, tile.rows)
        column_tiles = cdiv(m, tile.columns)
        self.tiles = cdiv(column_tiles, min(column_tiles, cdiv(PROGRAMS, self.blocks)))
        self.splits = cdiv(column_tiles, self.tiles)
        self.merging = cdiv(max(self.rows, m if columns else 0), MERGED)
        self.row_parts, self.column_parts = self.splits * self.rows, self.blocks * m if columns else 0
        self.losses = cdiv(n, self.rows) * self.merging

    def __iter__(self) -> Iterator[tuple[int, int, int, int]]:
        """Yields (start, stop, blocks, index of the strip's first partial loss)."""
        for k, start in enumerate(range(0, self.n, self.rows)):
            stop = min(start + self.rows, self.n)
            yield start, stop, cdiv(stop - start, self.tile.rows), k * self.merging
