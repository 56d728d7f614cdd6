"""The two products that turn dS into gradients: d_image = dS @ text and d_text = dS^T @ image.

D is too wide for a program to keep rows of a gradient in registers while it makes S, so dS is written out, but
only a block of BLOCK_ENTRIES at a time and in the type of the embeddings: 32 MiB in 16 bits, 64 MiB in float32,
whatever N. A loss makes a block with its own kernel (2 D flops an entry) and `products_kernel` uses it twice in one
launch (4 D flops). A block is read D / columns times from the cache that it just about fits into. Sums go on in
float32 from block to block: in the gradient itself where that is float32, else in a buffer of the columns' size
and one of a strip's. Blocks follow each other in a fixed order and every entry has one owner: no atomics.

Positives stay out of dS. What a loss knows of them, pull (n,), is subtracted in float32 behind the last block:
d_image[i] = factor * (sum - pull[i] * text[offset + i]), and so for d_text.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from d2s.kernels.fused.launch import INTERPRETED, cdiv, nothing, on, options, storage, whole
from d2s.kernels.fused.products_kernel import products_kernel
from d2s.kernels.fused.tiles import Tile, tile_for

BLOCK_ENTRIES = 1 << 24
BLOCK_ROWS = 4096
# Softmax and sigmoid values below 6e-8 would be 0 in fp16; this power of two keeps them, and 2 stays finite.
FP16_SCALE = 16384.0


@dataclass(frozen=True, kw_only=True)
class Block:
    """rows x columns of dS from (row_start, column_start) on; first_tile: how many tiles the ones before have."""

    first_tile: int
    row_start: int
    rows: int
    column_start: int
    columns: int


@dataclass(frozen=True, kw_only=True)
class Lists:
    """Which tiles of a block hold anything: per row and per column of tiles their indices, and how many."""

    row_tiles: Tensor
    row_count: Tensor
    column_tiles: Tensor
    column_count: Tensor


class Products:
    """The gradients of one call. Walk through `blocks`, write `ds` for each, then `multiply`.

    image (n, D), text (M, D), contiguous. tile: of the kernel that writes `ds` (rows, columns), padded to whole
    tiles, row stride `stride`, with zeros for what lies outside the matrix. dtype: of `d_image` (n, D) and
    `d_text` (M, D), which are empty where not needed. scaled: `ds` is written times `scale`; else as it is.
    """

    def __init__(
        self,
        image: Tensor,
        text: Tensor,
        tile: Tile,
        offset: int,
        need_image: bool,
        need_text: bool,
        dtype: torch.dtype,
        scaled: bool = True,
    ) -> None:
        self.image, self.text, self.offset = image, text, offset
        (n, width), m = image.shape, text.shape[0]
        self.pairs, self.tile = tile, tile_for("products", image)
        # The two are tuned apart. A chunk deeper than a tile of dS would read what nobody wrote.
        if (deepest := min(tile.rows, tile.columns)) < self.tile.depth:
            self.tile = replace(self.tile, depth=deepest)
        # A tile that reached beyond its block would be counted in the next one again.
        self.row_size = min(n, whole(BLOCK_ROWS, tile.rows))
        height = self._padded(self.row_size, tile.rows)
        fitting = max(1, BLOCK_ENTRIES // height // tile.columns) * tile.columns
        self.column_size = min(m, fitting)
        self.stride = self._padded(self.column_size, tile.columns)
        kept = storage(image.dtype)
        self.ds = image.new_empty(height if need_image or need_text else 0, self.stride, dtype=kept)
        self.scale = FP16_SCALE if scaled and kept == torch.float16 else 1.0
        dtype = storage(dtype)
        self.d_image = image.new_empty(n, width, dtype=dtype) if need_image else nothing(image, dtype)
        self.d_text = image.new_empty(m, width, dtype=dtype) if need_text else nothing(image, dtype)
        self.image_sum = self._sums(self.d_image, self.column_size < m, self.row_size)
        self.text_sum = self._sums(self.d_text, self.row_size < n, m)

    def _padded(self, size: int, span: int) -> int:
        """size, rounded up to whole tiles of both kernels."""
        return whole(size, max(span, self.tile.rows))

    @staticmethod
    def _sums(gradient: Tensor, several: bool, size: int) -> Tensor | None:
        """Where sums are kept from block to block: None where the gradient itself will do."""
        if gradient.dtype == torch.float32 or not several or not gradient.numel():
            return None
        return gradient.new_empty(size, gradient.shape[1], dtype=torch.float32)

    def grid(self, block: Block) -> tuple[int, int]:
        """A block's tiles of dS, by rows and columns."""
        return cdiv(block.rows, self.pairs.rows), cdiv(block.columns, self.pairs.columns)

    @property
    def tiles(self) -> int:
        """The tiles of all blocks."""
        grids = map(self.grid, self.blocks())
        return sum(rows * columns for rows, columns in grids)

    @property
    def skippable(self) -> bool:
        """Whether a program's rows lie within one tile of dS, so that a list of tiles can serve it."""
        return self.pairs.rows % self.tile.rows == 0 and self.pairs.columns % self.tile.rows == 0

    def blocks(self) -> Iterator[Block]:
        """The blocks by rows and then by columns."""
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
        """Adds the block's share. pull (n,) and factor (1 entry) float32; lists where empty tiles are skipped."""
        (n, width), m = self.image.shape, self.text.shape[0]
        tile, ds = self.tile, self.ds
        row_programs = cdiv(block.rows, tile.rows) if self.d_image.numel() else 0
        column_programs = cdiv(block.columns, tile.rows) if self.d_text.numel() else 0
        if row_programs + column_programs == 0:
            return
        d_image, d_text = self.d_image[block.row_start :], self.d_text[block.column_start :]
        text_sum = d_text if self.text_sum is None else self.text_sum[block.column_start :]
        with on(self.image):
            products_kernel[row_programs + column_programs, cdiv(width, tile.columns)](
                ds, self.image, self.text, ds if pull is None else pull, ds if factor is None else factor,
                d_image if self.image_sum is None else self.image_sum, text_sum, d_image, d_text,
                *((ds,) * 4 if lists is None else vars(lists).values()), self.stride, block.row_start, block.rows,
                block.column_start, block.columns, n, m, self.offset, row_programs,
                0 if lists is None else lists.row_tiles.shape[1], int(block.column_start == 0),
                int(block.column_start + block.columns == m), int(block.row_start == 0),
                int(block.row_start + block.rows == n),
                WIDTH=width, ROWS=tile.rows, COLUMNS=tile.columns, DEPTH=tile.depth, ROW_SPAN=self.pairs.rows,
                COLUMN_SPAN=self.pairs.columns, UNSCALE=1 / self.scale, PULL=pull is not None,
                FACTOR=factor is not None, SKIP=lists is not None, UPCAST=INTERPRETED, **options(tile),
            )  # fmt: skip
