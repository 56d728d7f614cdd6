"""Sorting with sources: against numpy's stable sort, where 32 bits tell values apart and where they do not."""

import numpy as np
import pytest
from problems import sides

from d2s.kernels.chunked import order


def values(kind, width, length):
    rng = np.random.default_rng(length)
    x = rng.standard_normal((width, length))
    if kind == "close":
        x = 1 + 1e-6 * x
    elif kind == "some close":
        x = np.where(rng.random(x.shape) < 0.1, 1 + 1e-5 * x, x)
    elif kind == "equal":
        x = np.round(x)
    elif kind == "one":
        x = np.full_like(x, -3.5)
    elif kind == "rising":
        x = 1 + 1e-7 * np.arange(length) + 0 * x
    elif kind == "extreme":
        x = np.select([x < -1, x > 1], [-np.inf, np.inf], 1e-40 * x)
    return (x.astype(np.float32) + np.float32(0)).reshape(width, length)


KINDS = ("normal", "close", "some close", "equal", "one", "rising", "extreme")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width, length", [(1, 1), (3, 2), (5, 17), (64, 577), (2, 5000)])
def test_sorts_like_a_stable_sort(kind, width, length):
    x = values(kind, width, length)
    scratch = order.Scratch(x.size, x.size)
    expected = np.argsort(-x, axis=1, kind="stable")
    ordered = np.empty_like(x)
    source = order.sort_with_source(x.copy(), ordered, scratch)
    assert np.array_equal(source, expected)
    assert np.array_equal(ordered, np.take_along_axis(x, expected, 1))
    assert np.array_equal(order.sort_values(x.copy(), scratch), ordered)


def test_both_ways_are_taken():
    """Normal values by 32 bits; values that agree in nearly all of them by 64."""
    taken = {}
    for kind in ("normal", "some close", "equal", "close"):
        x = values(kind, 16, 577)
        scratch = order.Scratch(x.size, x.size)
        taken[kind] = order._sort_narrow(x, np.empty_like(x), scratch) is not None
    assert taken == {"normal": True, "some close": True, "equal": True, "close": False}


def test_values_of_16_bits_need_no_mending(monkeypatch):
    image = sides(40, 64, 0)[0].bfloat16().float().numpy().copy()
    monkeypatch.setattr(order, "MOST", 0.0)
    scratch = order.Scratch(image.size, image.size)
    assert order._sort_narrow(image, np.empty_like(image), scratch) is not None
