"""The contrastive losses in Triton: by the error rule against float64, and what a sweep in parts must not change."""

import math
from dataclasses import replace

import pytest
import torch
from contrast import ALL, check, exact, ours, problem, rows_of
from judge import DTYPES, slope, strided
from problems import CONTRASTIVE, Numbers

from d2s.kernels.fused import hinge_gather, launch, products, tiles
from d2s.kernels.fused.tiles import Tile
from d2s.kernels.sides import Sides

KINDS = ("random", "clustered", "duplicated", "identical")
CASES = tuple(zip(KINDS, (1.0, 14.0, 100.0, 200.0), (0.0, 0.2, 0.5, 1.0), strict=True))


@pytest.fixture
def small_parts(monkeypatch):
    """Strips, blocks and ranges of columns so small that small problems have several of each, the last one cut."""
    monkeypatch.setattr(launch, "STRIP", 64)
    monkeypatch.setattr(launch, "MERGED", 32)
    monkeypatch.setattr(products, "BLOCK_ROWS", 64)
    monkeypatch.setattr(products, "BLOCK_ENTRIES", 64 * 64)
    monkeypatch.setattr(hinge_gather, "FEW", 0)


@pytest.mark.parametrize("name", CONTRASTIVE)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "n, width, distinct", [(1, 1, 1), (2, 31, 2), (17, 1, 4), (17, 64, 17), (70, 123, 1)]
)
def test_agrees_with_oracle(name, dtype, n, width, distinct):
    for seed, (kind, scale, margin) in enumerate(CASES):
        # Each type has every other case, and the next one the others.
        if seed % 2 != DTYPES.index(dtype) % 2:
            continue
        check(name, problem(n, width, distinct, dtype, kind, scale=scale, margin=margin, seed=seed))


@pytest.mark.slow
@pytest.mark.parametrize("name", CONTRASTIVE)
@pytest.mark.parametrize("dtype, case", list(zip(DTYPES, CASES[:3], strict=True)))
def test_agrees_with_oracle_over_several_tiles(name, dtype, case):
    kind, scale, margin = case
    check(name, problem(129, 123, 100, dtype, kind, scale=scale, margin=margin))


@pytest.mark.parametrize("name", CONTRASTIVE)
@pytest.mark.parametrize("start, stop", [(0, 9), (40, 140), (149, 150)])
def test_rows_against_more_columns(name, start, stop):
    check(name, rows_of(problem(150, 31, 90, kind="clustered"), start, stop))


@pytest.mark.slow
@pytest.mark.parametrize("name", CONTRASTIVE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.usefixtures("small_parts")
def test_agrees_with_oracle_in_parts(name, dtype):
    whole = problem(150, 70, 120, dtype, "clustered")
    check(name, whole)
    check(name, rows_of(whole, 40, 140))


LONG = Tile(rows=128, columns=64, depth=64, warps=8, stages=1)


@pytest.mark.slow
@pytest.mark.parametrize("name", CONTRASTIVE)
@pytest.mark.usefixtures("small_parts")
def test_parts_are_whole_tiles_however_long_a_tile_is(name, monkeypatch):
    """A device's 16-bit tiles have 128 rows, the interpreter's 64: strips and blocks of 64 rows have to grow."""
    # Both would write where they must not; these two lines fail first.
    assert launch.Strips(150, 150, LONG, True).rows == 128
    assert products.Products(Sides(*[torch.empty(150, 4)] * 4), LONG, ALL[:2], torch.float32).row_size == 128
    monkeypatch.setattr(tiles, "INTERPRETED", LONG)
    whole = problem(150, 70, 120, torch.float16, "clustered")
    check(name, whole)
    check(name, rows_of(whole, 5, 140))


@pytest.mark.slow
@pytest.mark.parametrize("name", CONTRASTIVE)
def test_products_read_no_deeper_than_a_tile_of_ds(name, monkeypatch):
    """The products' tile is tuned apart from the tile that dS is written in, and may be deeper."""
    deep = Tile(rows=64, columns=64, depth=128, warps=4, stages=1)
    monkeypatch.setattr(products, "tile_for", lambda kernel, x: deep)
    made = products.Products(Sides(*[torch.empty(300, 4)] * 4), LONG, ALL[:2], torch.float32)
    assert made.tile.depth == LONG.columns
    check(name, problem(150, 70, 120, torch.float32, "clustered"))


@pytest.mark.parametrize("name", CONTRASTIVE)
def test_negative_and_zero_scale(name):
    for scale in (-30.0, 0.0):
        check(name, problem(20, 16, 12, scale=scale))


@pytest.mark.parametrize("name", CONTRASTIVE)
def test_non_contiguous_inputs_give_the_same_bits(name):
    p = problem(40, 20, 30)
    apart = replace(p, image=strided(p.image), text=strided(p.text))
    assert not apart.image.is_contiguous()
    assert all(torch.equal(a, b) for a, b in zip(ours(name, p), ours(name, apart), strict=True))


@pytest.mark.parametrize("name", CONTRASTIVE)
@pytest.mark.usefixtures("small_parts")
def test_repeats_give_the_same_bits(name):
    p = problem(80, 31, 60, torch.float16, "clustered")
    first = ours(name, p)
    for _ in range(2):
        assert all(torch.equal(a, b) for a, b in zip(first, ours(name, p), strict=True))


@pytest.mark.parametrize("name", CONTRASTIVE)
def test_what_is_not_needed_is_empty_and_changes_nothing(name):
    p = problem(70, 31, 50)
    everything = ours(name, p)
    for left_out in range(len(everything) - 1):
        need = [k != left_out for k in range(4)]
        some = ours(name, p, need)
        assert torch.equal(some[0], everything[0])
        for k, (a, b) in enumerate(zip(some[1:], everything[1:], strict=True)):
            assert a.numel() == 0 if k == left_out else torch.equal(a, b)
    loss, *nothing = ours(name, p, [False] * 4)
    assert torch.equal(loss, everything[0])
    assert not any(x.numel() for x in nothing)


@pytest.mark.parametrize("name", CONTRASTIVE)
def test_gradients_have_the_slope_of_the_loss(name):
    """Directional central differences through the kernel itself."""
    # Far from the kinks of the hinge on the way of a step, as a change of winners would show.
    p = problem(24, 16, 18, scale=5.0, margin=0.3)
    loss, *gradients = ours(name, p)
    fields = ("image", "text", "scale", "bias")[: len(gradients)]
    for seed, (field, gradient) in enumerate(zip(fields, gradients, strict=True)):
        x = getattr(p, field)
        g = Numbers(seed)
        direction = g.randn(x.shape)
        direction /= direction.norm()

        def at(moved, field=field):
            return ours(name, type(p)(**{**vars(p), field: moved}), [False] * 4)[0]

        measured = 0.75 * slope(at, x, direction, 4e-3)
        assert measured == pytest.approx(
            float((gradient * direction).sum()), rel=2e-2, abs=2e-3 * float(loss)
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("both", [True, False])
def test_hardest_of_equals_is_the_lowest_index(dtype, both, monkeypatch):
    """Texts 1, 70 and 140 are equally hard for image 0, and so are images for text 0; all in other tiles."""
    monkeypatch.setattr(launch, "STRIP", 64)
    p = problem(150, 150, 150, dtype)
    eye = torch.eye(150)
    p.image.copy_(eye)
    p.text.copy_(eye)
    for k in (140, 1, 70):
        p.image[k] += 0.5 * eye[0]
        p.text[k] += 0.5 * eye[0]
    options = {**vars(p), "margin": 0.6, "both": both}
    _, d_image, d_text = ours("hinge_max", type(p)(**options))
    assert d_text[1, 0] > d_text[70, 0] == d_text[140, 0]
    if both:
        assert d_image[1, 0] > d_image[70, 0] == d_image[140, 0]


@pytest.mark.parametrize("name", ["hinge_max", "hinge_sum"])
def test_violation_of_exactly_zero_has_no_gradient(name):
    p = problem(20, 20, 20, margin=1.0)
    p.image.copy_(torch.eye(20))
    p.text.copy_(torch.eye(20))
    loss, d_image, d_text = ours(name, p)
    assert float(loss) == 0.0
    assert not d_image.any()
    assert not d_text.any()


@pytest.mark.usefixtures("small_parts")
def test_tiles_without_violations_are_not_read(monkeypatch):
    """dS is full of what is no number before anything is written: whatever is read must have been written."""
    made = products.Products.__init__

    def poisoned(self, *arguments, **options):
        made(self, *arguments, **options)
        self.ds.fill_(torch.nan)

    monkeypatch.setattr(products.Products, "__init__", poisoned)
    p = problem(200, 200, 200)
    eye = torch.eye(200)
    p.image.copy_(eye)
    p.text.copy_(eye)
    p.text[150] += 0.9 * eye[3]
    assert all(bool(x.isfinite().all()) for x in ours("hinge_sum", p))
    check("hinge_sum", p)


@pytest.mark.parametrize("name", CONTRASTIVE)
def test_what_is_no_number_shows_in_the_loss(name):
    p = problem(70, 8, 60)
    p.image[66, 3] = math.nan
    loss, *_ = ours(name, p)
    assert loss.isnan()


def test_a_sure_model_keeps_its_gradient():
    """1 - P is below the last bit of P here; a softmax that is subtracted from 1 has no digit right."""
    p = problem(33, 8, 33, kind="identical", scale=25.0, seed=3)
    for mine, true in zip(ours("info_nce", p), exact("info_nce", p), strict=True):
        assert float((mine.double() - true).norm()) <= 2e-5 * float(true.norm())


def test_parts_grow_slower_than_the_batch():
    """Their number of rows is bounded, so that twice the batch is at most twice the columns."""
    tile = Tile(rows=128, columns=64, depth=64, warps=8, stages=3)

    def parts(n):
        strips = launch.Strips(n, n, tile, True)
        return strips.row_parts + strips.column_parts + strips.losses

    assert parts(8192) < 2 * parts(4096)
    assert parts(131072) <= 32 * parts(4096)


@pytest.mark.parametrize("need", [ALL, [False, False, True, True]])
def test_blocks_of_ds_are_bounded(need):
    image = torch.empty(1, 4).expand(40_000, 4)
    tile = Tile(rows=64, columns=64, depth=64, warps=4, stages=1)
    made = products.Products(Sides(image, image, image, image), tile, need[:2], torch.float32)
    assert made.ds.numel() <= products.BLOCK_ENTRIES
    assert sum(b.rows * b.columns for b in made.blocks()) == 40_000**2
