"""Counts violated margins for `hinge_sum.py`, lists tiles, and adds the gradient of the positives.

Let count[i] be the number of negatives that violate the margin in row i or column offset + i. The positives
add -count[i] * text[offset + i] to d_image[i] and -count[i] * image[i] to d_text[offset + i].
"""

import torch
import triton
import triton.language as tl

from d2s.kernels.fused.launch import MERGE, cdiv, power_of_two, untiled
from d2s.kernels.fused.products import Block, Lists, Products
from d2s.kernels.fused.spec import KernelSpec

# Rows and channels that each program of `_pull` computes.
_PULL = {"ROWS": 16, "COLUMNS": 128}


@triton.jit
def _listed(active, stride, tiles, list_at, count, TILES: tl.constexpr):
    """Writes all k < `tiles` with active[k * stride] = 1 to `list_at`, and the number of them to `count`."""
    lane = tl.arange(0, TILES)
    some = tl.load(active + lane * stride, mask=lane < tiles, other=0)
    tl.store(list_at + tl.cumsum(some, 0) - 1, lane, mask=some > 0)
    tl.store(count, tl.sum(some, 0))


@triton.jit
def _counted(counts, parts, at, size, out, first, inside):
    """Sums columns `at` of counts (parts, size). Adds the sums to out[at], or writes them if `first`."""
    value = tl.load(out + at, mask=inside & (first == 0), other=0.0)
    pointers = counts + at
    for _ in range(parts):
        value += tl.load(pointers, mask=inside, other=0.0)
        pointers += size
    tl.store(out + at, value, mask=inside)


@triton.jit(
    do_not_specialize=("row_start", "column_start", "n", "m", "row_tiles", "column_tiles", "height", "width")
)
def _lists(
    active,  # (row tiles, column tiles)
    row_counts,  # (column tiles, block rows)
    column_counts,  # (row tiles, block columns)
    row_list,  # (row tiles, TILES)
    row_count,  # (row tiles,)
    column_list,  # (column tiles, TILES)
    column_count,  # (column tiles,)
    row_total,  # (B,)
    column_total,  # (N,)
    row_start, column_start, n, m, row_tiles, column_tiles, height, width,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TILES: tl.constexpr, BOTH: tl.constexpr,
):  # fmt: skip
    """Lists the tiles with violations and adds up counts, for one row or column of tiles per program."""
    program = tl.program_id(0)
    if program < row_tiles:
        start = active + program * column_tiles
        _listed(start, 1, column_tiles, row_list + program * TILES, row_count + program, TILES)
        at = program * ROWS + tl.arange(0, ROWS)
        inside = row_start + at < n
        _counted(row_counts, column_tiles, at, height, row_total + row_start, column_start == 0, inside)
    else:
        program -= row_tiles
        start = active + program
        _listed(start, column_tiles, row_tiles, column_list + program * TILES, column_count + program, TILES)
        if BOTH:
            at = program * COLUMNS + tl.arange(0, COLUMNS)
            inside = column_start + at < m
            _counted(column_counts, row_tiles, at, width, column_total + column_start, row_start == 0, inside)


@triton.jit(do_not_specialize=("n", "offset"))
def _pull(
    image,  # (B, D)
    text,  # (N, D)
    row_total,  # (B,)
    column_total,  # (N,)
    d_image,  # (B, D)
    d_text,  # (N, D)
    n, offset,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BOTH: tl.constexpr, IMAGE: tl.constexpr,
    TEXT: tl.constexpr,
):  # fmt: skip
    """Subtracts count * partner from both gradients, for ROWS positive pairs and COLUMNS channels."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    k = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask = (row < n)[:, None] & (k < WIDTH)[None, :]
    count = tl.load(row_total + row, mask=row < n, other=0.0)
    if BOTH:
        count += tl.load(column_total + row, mask=row < n, other=0.0)
    own = row.to(tl.int64)[:, None] * WIDTH + k[None, :]
    partner = (row + offset).to(tl.int64)[:, None] * WIDTH + k[None, :]
    if IMAGE:
        value = count[:, None] * tl.load(text + partner, mask=mask, other=0.0).to(tl.float32)
        tl.store(d_image + own, tl.load(d_image + own, mask=mask, other=0.0) - value, mask=mask)
    if TEXT:
        value = count[:, None] * tl.load(image + own, mask=mask, other=0.0).to(tl.float32)
        tl.store(d_text + partner, tl.load(d_text + partner, mask=mask, other=0.0) - value, mask=mask)


class Counts:
    """Holds the number of violations in each row and column, and lists of the tiles with violations.

    `hinge_sum.py` writes `rows`, `columns` and `active` for a block. The kernel `_lists` reads them as
    `row_counts`, `column_counts` and `active`. The argument `block` is the largest block. If `single` is
    true, one tile holds the whole matrix. Then its counts are the totals, and no lists are needed. Both
    methods must be called inside `on_device_of`.
    """

    def __init__(self, products: Products, block: Block, single: bool) -> None:
        both = products.sides.both
        self.products, self.both, tile = products, both, products.pairs
        n, m = products.image.shape[0], products.text.shape[0] if both else 0
        floats, ints = ({"dtype": t, "device": products.image.device} for t in (torch.float32, torch.int32))
        row_tiles, column_tiles = products.grid(block)
        tiles = row_tiles * column_tiles
        self.rows = torch.empty(tiles * tile.rows, **floats)
        self.columns = torch.empty(tiles * tile.columns if both else 0, **floats)
        self.row_total = self.rows if single else torch.empty(n, **floats)
        self.column_total = self.columns if single else torch.empty(m, **floats)
        self.active = torch.empty(0 if single else tiles, **ints)
        self.length = power_of_two(max(row_tiles, column_tiles))
        self.lists = None
        if not single:
            self.lists = Lists(
                row_tiles=torch.empty(row_tiles, self.length, **ints),
                row_count=torch.empty(row_tiles, **ints),
                column_tiles=torch.empty(column_tiles, self.length, **ints),
                column_count=torch.empty(column_tiles, **ints),
            )

    def add(self, block: Block) -> Lists | None:
        """Adds a block's counts to the totals. Returns lists of tiles, or None if no tile can be skipped."""
        if self.lists is None:
            return None
        tile, (row_tiles, column_tiles) = self.products.pairs, self.products.grid(block)
        n, m = self.products.image.shape[0], self.products.text.shape[0]
        _lists[(row_tiles + column_tiles,)](
            self.active, self.rows, self.columns, *vars(self.lists).values(), self.row_total, self.column_total,
            block.row_start, block.column_start, n, m, row_tiles, column_tiles, row_tiles * tile.rows,
            column_tiles * tile.columns, ROWS=tile.rows, COLUMNS=tile.columns, TILES=self.length, BOTH=self.both,
        )  # fmt: skip
        return self.lists if self.products.skippable else None

    def pull(self) -> None:
        """Adds the gradient of the positives to d_image and d_text."""
        products, (n, width) = self.products, self.products.image.shape
        d_image, d_text = products.d_image, products.d_text
        _pull[cdiv(n, _PULL["ROWS"]), cdiv(width, _PULL["COLUMNS"])](
            products.image, products.text, self.row_total, self.column_total, d_image, d_text, n,
            products.sides.offset, WIDTH=width, BOTH=self.both, **_PULL,
            IMAGE=d_image.numel() > 0, TEXT=d_text.numel() > 0,
        )  # fmt: skip


SPECS = [
    KernelSpec(
        name="hinge_sum_lists",
        kernel=_lists,
        pointers={
            **dict.fromkeys(("active", "row_list", "row_count", "column_list", "column_count"), "*i32"),
            **dict.fromkeys(("row_counts", "column_counts", "row_total", "column_total"), "*fp32"),
        },
        constants=lambda tile, width, half: {"ROWS": 128, "COLUMNS": 128, "TILES": 64, "BOTH": True},
        **MERGE,
    ),
    KernelSpec(
        name="hinge_sum_pull",
        kernel=_pull,
        pointers=dict.fromkeys(("row_total", "column_total", "d_image", "d_text"), "*fp32"),
        constants=lambda tile, width, half: {
            **_PULL, "WIDTH": width, "BOTH": True, "IMAGE": True, "TEXT": True
        },
        options=untiled,
        dots=False,
    ),
]  # fmt: skip
