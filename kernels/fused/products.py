"""Turns dS, the gradient with respect to S, into gradients: d_image = dS @ text and d_text = dS^T @ image.

A program that computes S cannot hold rows of a gradient in registers, because D is too wide. So dS is written
to memory in the type of the embeddings, one block of BLOCK_ENTRIES at a time: 32 MiB in 16 bits, 64 MiB in
float32, for any N. The kernel of a loss writes a block (2 D flops per entry). Then `products_kernel`
multiplies the block with both sides in one launch (4 D flops per entry). It reads the block D / COLUMNS times
from the cache. Sums over blocks are float32. They are kept in the gradient itself if it is float32, else in
buffers. No atomics are needed, because the order of blocks is fixed and one program writes each entry.

Positives stay out of dS. `pull`, of shape (B,), holds their weights, applied in float32 after the last block:
d_image[i] = factor * (sum - pull[i] * text[offset + i]). The formula for d_text is the same with the sides
exchanged.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from d2s.kernels.fused.launch import (
    INTERPRETED,
    cdiv,
    not_needed,
    on_device_of,
    options,
    round_up,
    storage,
)
from d2s.kernels.fused.products_kernel import products_kernel
from d2s.kernels.fused.tiles import Tile, tile_for
from d2s.kernels.sides import Sides

BLOCK_ENTRIES = 1 << 24
BLOCK_ROWS = 4096
# Factor for dS in fp16, in which values below 6e-8 would become 0. dS <= 2, so the product stays finite.
FP16_SCALE = 16384.0


@dataclass(frozen=True, kw_only=True)
class Block:
    """Describes a block of `rows` x `columns` entries of dS. All earlier blocks have `first_tile` tiles."""

    first_tile: int
    row_start: int
    rows: int
    column_start: int
    columns: int


@dataclass(frozen=True, kw_only=True)
class Lists:
    """Lists the tiles of a block that are not all zero, for each row and each column of tiles."""

    row_tiles: Tensor  # (row tiles, length) int32
    row_count: Tensor  # (row tiles,) int32
    column_tiles: Tensor  # (column tiles, length) int32
    column_count: Tensor  # (column tiles,) int32


class Products:
    """Computes `d_image` and `d_text`. For each of `blocks`, the caller fills `ds` and calls `multiply`.

    `sides` must be contiguous. `tile` is the tile of the kernel that fills `ds`. This kernel must write zeros
    to the entries of its tiles that lie outside the matrix. `d_image` and `d_text` have the type `dtype`, or
    are empty if `need` does not select them. If `scaled` is true, `ds` holds dS * `self.scale`, so that small
    numbers do not become 0 in fp16.
    """

    def __init__(
        self, sides: Sides, tile: Tile, need: Sequence[bool], dtype: torch.dtype, scaled: bool = True
    ) -> None:
        self.sides = sides
        self.image, self.text = image, text = sides.image, sides.text
        (n, width), m = image.shape, text.shape[0]
        self.pairs, self.tile = tile, tile_for("products", image)
        # The tiles of the two kernels are tuned separately. A chunk that is deeper than a tile of dS would
        # include memory that was never written.
        if (deepest := min(tile.rows, tile.columns)) < self.tile.depth:
            self.tile = replace(self.tile, depth=deepest)
        # The size must be a multiple of the tile. A tile that crosses the block's end would be counted again
        # in the next block.
        self.row_size = min(n, round_up(BLOCK_ROWS, tile.rows))
        height = self._padded(self.row_size, tile.rows)
        fitting = max(1, BLOCK_ENTRIES // height // tile.columns) * tile.columns
        self.column_size = min(m, fitting)
        self.stride = self._padded(self.column_size, tile.columns)
        ds_type = storage(image.dtype)
        self.ds = image.new_empty(height if any(need) else 0, self.stride, dtype=ds_type)
        self.scale = FP16_SCALE if scaled and ds_type == torch.float16 else 1.0
        dtype = storage(dtype)
        self.d_image = image.new_empty(n, width, dtype=dtype) if need[0] else not_needed(image, dtype)
        self.d_text = image.new_empty(m, width, dtype=dtype) if need[1] else not_needed(image, dtype)
        self.image_sum = self._sums(self.d_image, self.column_size < m, self.row_size)
        self.text_sum = self._sums(self.d_text, self.row_size < n, m)

    def _padded(self, size: int, span: int) -> int:
        """Returns `size`, rounded up to full tiles of both kernels. `span` is the loss kernel's tile size."""
        return round_up(size, max(span, self.tile.rows))

    @staticmethod
    def _sums(gradient: Tensor, several: bool, size: int) -> Tensor | None:
        """Returns a float32 buffer for sums over blocks, or None if the gradient itself can hold the sums."""
        if gradient.dtype == torch.float32 or not several or not gradient.numel():
            return None
        return gradient.new_empty(size, gradient.shape[1], dtype=torch.float32)

    def grid(self, block: Block) -> tuple[int, int]:
        """Returns the number of tile rows and of tile columns in a block."""
        return cdiv(block.rows, self.pairs.rows), cdiv(block.columns, self.pairs.columns)

    @property
    def tiles(self) -> int:
        """Counts the tiles in all blocks."""
        return sum(rows * columns for rows, columns in map(self.grid, self.blocks()))

    @property
    def skippable(self) -> bool:
        """Tells whether the products can skip tiles. Each program's rows must lie within one tile of dS."""
        return self.pairs.rows % self.tile.rows == 0 and self.pairs.columns % self.tile.rows == 0

    def blocks(self) -> Iterator[Block]:
        """Yields the blocks of dS, row by row."""
        n, m = self.image.shape[0], self.text.shape[0]
        first_tile = 0
        for row_start in range(0, n, self.row_size):
            for column_start in range(0, m, self.column_size):
                block = Block(
                    first_tile=first_tile,
                    row_start=row_start,
                    rows=min(self.row_size, n - row_start),
                    column_start=column_start,
                    columns=min(self.column_size, m - column_start),
                )
                yield block
                rows, columns = self.grid(block)
                first_tile += rows * columns

    def multiply(
        self, block: Block, pull: Tensor | None, factor: Tensor | None, lists: Lists | None = None
    ) -> None:
        """Adds the products of a block to the gradients. Reads only the tiles in `lists`, if given.

        The module's docstring explains `pull`, of shape (B,), and `factor`, of shape (1,). Both are float32.
        """
        (n, width), m = self.image.shape, self.text.shape[0]
        tile, ds = self.tile, self.ds
        row_programs = cdiv(block.rows, tile.rows) if self.d_image.numel() else 0
        column_programs = cdiv(block.columns, tile.rows) if self.d_text.numel() else 0
        if row_programs + column_programs == 0:
            return
        d_image, d_text = self.d_image[block.row_start :], self.d_text[block.column_start :]
        text_sum = d_text if self.text_sum is None else self.text_sum[block.column_start :]
        with on_device_of(self.image):
            products_kernel[row_programs + column_programs, cdiv(width, tile.columns)](
                ds, self.image, self.text, ds if pull is None else pull, ds if factor is None else factor,
                d_image if self.image_sum is None else self.image_sum, text_sum, d_image, d_text,
                *((ds,) * 4 if lists is None else vars(lists).values()), self.stride, block.row_start, block.rows,
                block.column_start, block.columns, n, m, self.sides.offset, row_programs,
                0 if lists is None else lists.row_tiles.shape[1], int(block.column_start == 0),
                int(block.column_start + block.columns == m), int(block.row_start == 0),
                int(block.row_start + block.rows == n),
                WIDTH=width, ROWS=tile.rows, COLUMNS=tile.columns, DEPTH=tile.depth, ROW_SPAN=self.pairs.rows,
                COLUMN_SPAN=self.pairs.columns, UNSCALE=1 / self.scale, PULL=pull is not None,
                FACTOR=factor is not None, SKIP=lists is not None, UPCAST=INTERPRETED, **options(tile),
            )  # fmt: skip
