"""The contrastive losses against dense float64 oracles, and what workers must add up to."""

import math

import pytest
import torch
from problems import CONTRASTIVE, KINDS, Numbers, contrastive, image_ids, sides, value_and_gradients, worst

from d2s.kernels import functional, reference
from d2s.kernels.chunked import common, info_nce


@pytest.fixture(params=[1 << 21, 256], ids=["one-chunk", "many-chunks"])
def chunks(request, monkeypatch):
    """Small problems in one chunk, and in chunks whose last one is cut."""
    monkeypatch.setattr(common, "CHUNK_ENTRIES", request.param)
    if request.param < 1000:
        monkeypatch.setattr(common, "MIN_ROWS", 5)


def both_implementations(name, inputs, ids, text_ids=None, **options):
    def run(module):
        return value_and_gradients(
            lambda image, text, scale, bias: contrastive(
                module, name, image, text, ids, text_ids, scale=scale, bias=bias, **options
            ),
            *inputs,
        )

    return run(functional), run(reference)


@pytest.mark.parametrize("name", CONTRASTIVE)
@pytest.mark.parametrize(
    "n, width, distinct",
    [(1, 1, 1), (2, 1, 2), (2, 3, 1), (17, 5, 4), (33, 31, 33), (33, 8, 1), (70, 16, 30), (129, 64, 129)],
)
@pytest.mark.usefixtures("chunks")
def test_agrees_with_oracle(name, n, width, distinct):
    ids = image_ids(n, distinct, n)
    for k, scale in enumerate((1.0, 14.0, 100.0, 200.0)):
        # A margin of 0 with duplicates would put violations on the kink itself, where rounding decides.
        margin = (0.0, 0.2, 0.5, 1.0)[k] if KINDS[k] != "duplicated" else 0.3
        inputs = (*sides(n, width, k, KINDS[k]), torch.tensor([scale]).double(), -torch.ones(1).double())
        ours, theirs = both_implementations(name, inputs, ids, margin=margin)
        assert worst(ours, theirs) < 1e-10, (KINDS[k], scale)


@pytest.mark.parametrize("name", CONTRASTIVE)
@pytest.mark.usefixtures("chunks")
def test_rows_against_more_columns_agree_with_oracle(name):
    image, text = sides(60, 12, 3)
    ids = image_ids(60, 25, 3)
    for start, stop in ((0, 60), (0, 7), (13, 40), (59, 60)):
        inputs = (image[start:stop], text, torch.tensor([20.0]).double(), torch.tensor([-3.0]).double())
        ours, theirs = both_implementations(name, inputs, ids[start:stop], ids, offset=start, both=False)
        assert worst(ours, theirs) < 1e-10, (start, stop)


@pytest.mark.parametrize("workers", [1, 2, 4])
@pytest.mark.parametrize("name", CONTRASTIVE)
def test_workers_add_up_to_the_whole_batch(name, workers):
    n, ids = 48, image_ids(48, 30, 1)
    inputs = (*sides(n, 9, 5), torch.tensor([14.0]).double(), torch.tensor([-7.0]).double())

    def by_workers(image, text, scale, bias):
        total = 0
        for offset in range(0, n, n // workers):
            own = slice(offset, offset + n // workers)
            options = {"scale": scale, "bias": bias, "offset": offset, "both": False}
            total = total + contrastive(functional, name, image[own], text, ids[own], ids, **options)
            if name != "sigmoid":
                total = total + contrastive(functional, name, text[own], image, ids[own], ids, **options)
        return total

    def at_once(image, text, scale, bias):
        return contrastive(functional, name, image, text, ids, scale=scale, bias=bias)

    assert worst(value_and_gradients(by_workers, *inputs), value_and_gradients(at_once, *inputs)) < 1e-10


@pytest.mark.parametrize("name", CONTRASTIVE)
def test_gradcheck(name):
    image, text = sides(9, 6, 11)
    inputs = [x.requires_grad_() for x in (image, text, torch.tensor([3.0]).double())]
    bias = torch.tensor([-1.0], dtype=torch.float64, requires_grad=True)
    ids = image_ids(9, 6, 2)

    def loss(image, text, scale, bias):
        return contrastive(functional, name, image, text, ids, scale=scale, bias=bias)

    assert torch.autograd.gradcheck(loss, (*inputs, bias))


@pytest.mark.parametrize("name", CONTRASTIVE)
def test_same_image_is_never_a_negative(name):
    """With one image in the whole batch only the positive pairs are left."""
    image, text = sides(40, 8, 0)
    ids = torch.full((40,), 5)
    got = contrastive(functional, name, image, text, ids, scale=10.0 * torch.ones(1), bias=torch.zeros(1))
    positive = torch.nn.functional.softplus(-10 * (image * text).sum(1)).sum()
    assert float(got) == pytest.approx(float(positive) if name == "sigmoid" else 0.0, abs=1e-5)


@pytest.mark.parametrize("hardest", [True, False])
def test_positive_is_no_negative_even_under_another_id(hardest):
    image, text = sides(6, 4, 0)
    apart = torch.arange(6), torch.arange(6) + 100
    same = torch.arange(6), torch.arange(6)
    options = {"margin": 0.3, "hardest": hardest, "offset": 0, "both": True}
    first, second = (functional.hinge_loss(image, text, *ids, **options) for ids in (apart, same))
    assert torch.equal(first, second)


def test_hinge_by_hand():
    """Two pairs at right angles but for one negative: violations 0.2 + 0.6 - 1, 0.2 + 0 - 0.8 ..."""
    image = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    text = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    ids = torch.arange(2)
    options = {"hardest": True, "offset": 0, "both": True}
    # rows: 0.6 - 1 + m, 0 - 0.8 + m; columns: 0 - 1 + m, 0.6 - 0.8 + m
    assert float(functional.hinge_loss(image, text, ids, ids, margin=0.5, **options)) == pytest.approx(0.4)
    assert float(functional.hinge_loss(image, text, ids, ids, margin=0.1, **options)) == 0.0


@pytest.mark.parametrize("hardest", [True, False])
def test_violation_of_exactly_zero_has_no_gradient(hardest):
    image = torch.eye(3, requires_grad=True)
    text = torch.eye(3, requires_grad=True)
    ids = torch.arange(3)
    loss = functional.hinge_loss(image, text, ids, ids, margin=1.0, hardest=hardest, offset=0, both=True)
    loss.backward()
    assert loss.item() == 0.0
    assert not image.grad.any()
    assert not text.grad.any()


@pytest.mark.parametrize("rows", [1 << 21, 64, 3])
def test_hardest_of_equals_is_the_lowest_index(rows, monkeypatch):
    """Texts 1, 40 and 80 are equally hard for image 0, and so are images for text 0: 1 gets the gradient."""
    monkeypatch.setattr(common, "CHUNK_ENTRIES", rows * 96)
    monkeypatch.setattr(common, "MIN_ROWS", 1)
    eye = torch.eye(96)
    image, text = eye.clone(), eye.clone()
    text[[1, 40, 80]] += 0.5 * eye[0]
    image[[1, 40, 80]] += 0.5 * eye[0]
    image.requires_grad_()
    text.requires_grad_()
    ids = torch.arange(96)
    functional.hinge_loss(image, text, ids, ids, margin=0.6, hardest=True, offset=0, both=True).backward()
    # Row 0 pulls its hardest text towards -image[0]; any other text sees channel 0 only through its own.
    assert text.grad[1, 0] > text.grad[40, 0]
    assert text.grad[40, 0] == text.grad[80, 0]
    assert image.grad[1, 0] > image.grad[40, 0]
    assert image.grad[40, 0] == image.grad[80, 0]


@pytest.mark.parametrize("name", CONTRASTIVE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_is_as_good_as_dense_in_float32(name, dtype):
    """Inputs are rounded once; everything after that is float32, so the oracle on the rounded inputs is met."""
    inputs = [x.to(dtype) for x in sides(128, 96, 4, "clustered")]
    ids = image_ids(128, 100, 4)

    def run(module, inputs):
        return value_and_gradients(
            lambda image, text: contrastive(
                module, name, image, text, ids, scale=torch.tensor([100.0]), bias=torch.tensor([-10.0])
            ),
            *inputs,
        )

    ours = run(functional, inputs)
    theirs = run(reference, [x.double() for x in inputs])
    assert ours[0].dtype == torch.float32
    assert ours[1].dtype == dtype
    step = max(torch.finfo(dtype).eps, 2e-5)
    for a, b in zip(ours, theirs, strict=True):
        assert float((a.double() - b).norm()) <= step * float(b.norm()) + 1e-6


@pytest.mark.parametrize("name", CONTRASTIVE)
def test_extreme_logits_stay_finite(name):
    image, text = sides(64, 16, 8, "identical", torch.float32)
    for scale in (1e-6, 1.0, 200.0, 1e4):
        inputs = (image, text, torch.tensor([scale]), torch.tensor([-10.0]))
        results = value_and_gradients(
            lambda i, t, s, b: contrastive(functional, name, i, t, torch.arange(64), scale=s, bias=b), *inputs
        )
        assert all(bool(x.isfinite().all()) for x in results)


def test_info_nce_of_a_collapsed_model_is_log_n():
    image = torch.ones(50, 4) / 2
    loss = contrastive(functional, "info_nce", image, image, torch.arange(50), scale=torch.tensor([100.0]))
    assert float(loss) == pytest.approx(50 * math.log(50), rel=1e-5)


@pytest.mark.on_cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("both", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("chunks")
def test_one_exponential_for_both_directions_gives_what_two_give(kind, both, dtype, monkeypatch):
    """Also at the edge: where the common shift is not 0, and so far out that there is none."""
    ids = image_ids(90, 70, 1)
    taken = set()
    for scale in (1.0, 60.0, 100.0, 150.0, 300.0, 3000.0):
        inputs = (*sides(90, 24, 3, kind, dtype), torch.tensor([scale], dtype=dtype))

        def run(inputs=inputs):
            return value_and_gradients(
                lambda i, t, s: contrastive(functional, "info_nce", i, t, ids, scale=s, both=both), *inputs
            )

        ours = run()
        taken.add(info_nce.common_shift(*inputs, 0))
        with monkeypatch.context() as patch:
            patch.setattr(info_nce, "common_shift", lambda *_: None)
            apart = run()
        # The sums behind a large logit are as uncertain as the logit's last bit.
        limit = 32 * torch.finfo(dtype).eps * max(scale, 10)
        assert all(bool(x.isfinite().all()) for x in ours)
        for a, b in zip(ours, apart, strict=True):
            assert float((a - b).norm()) <= limit * max(float(b.norm()), 1.0)
    assert 0.0 in taken
    # Positives far below the largest similarity leave no common shift; nearly identical pairs always do.
    assert kind != "random" or None in taken
    assert kind != "identical" or any(taken - {0.0, None})


def test_negative_scale_and_values_that_are_no_numbers():
    image, text = sides(20, 6, 0, dtype=torch.float32)
    ids = torch.arange(20)
    results = []
    for scale in (-150.0, -5.0):
        inputs = (image, text, torch.tensor([scale]))
        for module in (functional, reference):
            results.append(
                value_and_gradients(
                    lambda i, t, s, m=module: contrastive(m, "info_nce", i, t, ids, scale=s), *inputs
                )
            )
    assert worst(*results[:2]) < 1e-3
    assert worst(*results[2:]) < 1e-4
    image[3, 2] = torch.nan
    assert contrastive(functional, "info_nce", image, text, ids, scale=torch.ones(1)).isnan()


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 1.0])
@pytest.mark.parametrize("both", [True, False])
@pytest.mark.usefixtures("chunks")
def test_hinge_sum_where_few_rows_violate(share, both):
    """Rows without violations are left out of the products."""
    eye = torch.eye(64, dtype=torch.float64)
    rows = torch.arange(64) < 64 * share
    image = torch.where(rows[:, None], 0.3 * eye + 0.5 * eye.roll(7, 0), eye)
    inputs = (image, eye, torch.ones(1).double(), torch.ones(1).double())
    ours, theirs = both_implementations("hinge_sum", inputs, torch.arange(64), both=both, margin=0.3)
    assert worst(ours, theirs) < 1e-10
    assert (float(theirs[0]) > 0) == (share > 0)


@pytest.mark.on_cpu
@pytest.mark.parametrize("shape", [(0, 3), (1, 1), (700, 5), (300, 1000), (9, 1 << 14)])
def test_row_dots_by_blocks_are_those_of_all_rows_at_once(shape):
    g = Numbers(0)
    a, b = (g.randn(shape) for _ in range(2))
    assert torch.equal(common.row_dots(a, b), (a * b).sum(1))
