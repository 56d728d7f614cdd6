"""What the hinge with every violation counts and lists beside its products, and the positives' part of gradients."""

import torch
import triton
import triton.language as tl

from d2s.kernels.fused.launch import cdiv, power_of_two, untiled
from d2s.kernels.fused.products import Block, Lists, Products
from d2s.kernels.fused.spec import KernelSpec
from d2s.kernels.fused.tiles import Tile

# Rows and channels that a program of `_pull` owns.
PULLED = (16, 128)
LISTS_SIZES = ("row_start", "column_start", "n", "m", "row_tiles", "column_tiles", "height", "width")
PULL_SIZES = ("n", "offset")


@triton.jit
def _listed(active, stride, tiles, list_at, count, TILES: tl.constexpr):
    """Lists at list_at which of `tiles` entries of active, every stride-th, are 1, and how many these are."""
    lane = tl.arange(0, TILES)
    some = tl.load(active + lane * stride, mask=lane < tiles, other=0)
    tl.store(list_at + tl.cumsum(some, 0) - 1, lane, mask=some > 0)
    tl.store(count, tl.sum(some, 0))


@triton.jit
def _counted(counts, parts, at, size, out, first, inside):
    """Adds the counts (parts, size) of entries `at` to out; first: there is nothing there yet."""
    value = tl.load(out + at, mask=inside & (first == 0), other=0.0)
    pointers = counts + at
    for _ in range(parts):
        value += tl.load(pointers, mask=inside, other=0.0)
        pointers += size
    tl.store(out + at, value, mask=inside)


@triton.jit(do_not_specialize=LISTS_SIZES)
def _lists(
    active,
    row_counts,
    column_counts,
    row_list,
    row_count,
    column_list,
    column_count,
    row_total,
    column_total,
    row_start,
    column_start,
    n,
    m,
    row_tiles,
    column_tiles,
    height,
    width,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TILES: tl.constexpr,
    BOTH: tl.constexpr,
):
    """The first row_tiles programs see to a row of tiles, the others to a column of them; lists of TILES entries."""
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


@triton.jit(do_not_specialize=PULL_SIZES)
def _pull(
    image,
    text,
    row_total,
    column_total,
    d_image,
    d_text,
    n,
    offset,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BOTH: tl.constexpr,
    IMAGE: tl.constexpr,
    TEXT: tl.constexpr,
):
    """Subtracts each positive's count times the partner; ROWS rows and COLUMNS channels."""
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
    """What is counted for the positives and listed for the products, and where.

    block: the largest. both: columns are counted, too. whole: one tile is the whole matrix; its counts are the
    totals then, and there is nothing to list. rows, columns, active, lists: what a block's tiles write, see
    `_lists`.
    """

    def __init__(self, products: Products, block: Block, both: bool, whole: bool) -> None:
        self.products, self.both, tile = products, both, products.pairs
        n, m = products.image.shape[0], products.text.shape[0] if both else 0
        floats, ints = ({"dtype": t, "device": products.image.device} for t in (torch.float32, torch.int32))
        row_tiles, column_tiles = products.grid(block)
        tiles = row_tiles * column_tiles
        self.rows = torch.empty(tiles * tile.rows, **floats)
        self.columns = torch.empty(tiles * tile.columns if both else 0, **floats)
        self.row_total = self.rows if whole else torch.empty(n, **floats)
        self.column_total = self.columns if whole else torch.empty(m, **floats)
        self.active = torch.empty(0 if whole else tiles, **ints)
        self.length = power_of_two(max(row_tiles, column_tiles))
        self.lists = None
        if not whole:
            self.lists = Lists(
                row_tiles=torch.empty(row_tiles, self.length, **ints),
                row_count=torch.empty(row_tiles, **ints),
                column_tiles=torch.empty(column_tiles, self.length, **ints),
                column_count=torch.empty(column_tiles, **ints),
            )

    def add(self, block: Block) -> Lists | None:
        """Adds a block's counts to the totals and lists its tiles; under the tensors' device."""
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
        """Gives the gradients what the positives' counts ask for; under the tensors' device."""
        products, (n, width) = self.products, self.products.image.shape
        d_image, d_text = products.d_image, products.d_text
        _pull[cdiv(n, PULLED[0]), cdiv(width, PULLED[1])](
            products.image, products.text, self.row_total, self.column_total, d_image, d_text, n,
            products.offset, WIDTH=width, ROWS=PULLED[0], COLUMNS=PULLED[1], BOTH=self.both,
            IMAGE=d_image.numel() > 0, TEXT=d_text.numel() > 0,
        )  # fmt: skip


def _lists_constants(tile: Tile, width: int, half: bool) -> dict[str, object]:
    return {"ROWS": 128, "COLUMNS": 128, "TILES": 64, "BOTH": True}


def _pull_constants(tile: Tile, width: int, half: bool) -> dict[str, object]:
    sizes = {"WIDTH": width, "ROWS": PULLED[0], "COLUMNS": PULLED[1]}
    return {**sizes, "BOTH": True, "IMAGE": True, "TEXT": True}


SPECS = [
    KernelSpec(
        name="hinge_sum_lists",
        kernel=_lists,
        pointers={
            **dict.fromkeys(("active", "row_list", "row_count", "column_list", "column_count"), "*i32"),
            **dict.fromkeys(("row_counts", "column_counts", "row_total", "column_total"), "*fp32"),
        },
        scalars=dict.fromkeys(LISTS_SIZES, "i32"),
        constants=_lists_constants,
        options=untiled,
        unaligned=frozenset(LISTS_SIZES),
        dots=False,
        dtypes=("fp32",),
        widths=(64,),
    ),
    KernelSpec(
        name="hinge_sum_pull",
        kernel=_pull,
        pointers={
            **dict.fromkeys(("image", "text"), "*x"),
            **dict.fromkeys(("row_total", "column_total", "d_image", "d_text"), "*fp32"),
        },
        scalars=dict.fromkeys(PULL_SIZES, "i32"),
        constants=_pull_constants,
        options=untiled,
        unaligned=frozenset(PULL_SIZES),
        dots=False,
    ),
]
