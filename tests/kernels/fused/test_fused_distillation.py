"""Relational and pointwise distillation in Triton against the oracle, plain torch, and their own slopes."""

import pytest
import torch
from judge import DTYPES, assert_as_good, slope, spread, strided
from torch.nn.functional import normalize

from d2s.kernels import reference
from d2s.kernels.fused import pointwise, relational, relational_gradient


def relational_sides(n, m, width, teacher_width, dtype=torch.float32):
    """student, teacher, student_all, teacher_all."""
    shapes = (n, width), (n, teacher_width), (m, width), (m, teacher_width)
    return [normalize(spread(*shape, seed=i), dim=1).to(dtype) for i, shape in enumerate(shapes)]


def exact_relational(sides, temperature):
    student, teacher, every, teacher_every = (x.double() for x in sides)
    student.requires_grad_(), every.requires_grad_()
    loss = reference.relational_distillation(student, teacher, every, teacher_every, temperature=temperature)
    return [loss.detach(), *torch.autograd.grad(loss, (student, every))]


def dense_relational(sides, temperature):
    """As anybody would write it, in the type of the inputs."""
    student, teacher, every, teacher_every = (x.clone() for x in sides)
    student.requires_grad_(), every.requires_grad_()
    log_q = torch.log_softmax(student @ every.T / temperature, 1)
    log_p = torch.log_softmax(teacher @ teacher_every.T / temperature, 1)
    loss = (log_p.exp() * (log_p - log_q)).sum()
    return [loss.detach(), *torch.autograd.grad(loss, (student, every))]


@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 31), (2, 17, 64, 123), (17, 129, 31, 64), (129, 200, 123, 33), (70, 2, 96, 1)]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_relational_is_as_good_as_dense(shape, dtype):
    sides = relational_sides(*shape, dtype)
    ours = relational.relational_forward(*sides, 0.05, (True, True))
    assert [x.dtype for x in ours] == [torch.float32] * 3
    for got, dense, exact in zip(
        ours, dense_relational(sides, 0.05), exact_relational(sides, 0.05), strict=True
    ):
        assert_as_good(got, dense, exact, 3e-6)


@pytest.mark.parametrize("temperature", [0.005, 0.01, 1.0, 50.0])
def test_relational_at_any_temperature(temperature):
    sides = relational_sides(20, 70, 24, 40)
    ours = relational.relational_forward(*sides, temperature, (True, True))
    everything = zip(
        ours, dense_relational(sides, temperature), exact_relational(sides, temperature), strict=True
    )
    for got, dense, exact in everything:
        assert_as_good(got, dense, exact, 3e-6)


def test_relational_in_several_ranges_and_blocks(monkeypatch):
    """Ranges of columns, blocks of differences, and edges of both in the middle of a tile."""
    sides = relational_sides(150, 300, 20, 12)
    whole = relational.relational_forward(*sides, 0.1, (True, True))
    monkeypatch.setattr(relational, "PROGRAMS", 1)
    monkeypatch.setattr(relational_gradient, "BLOCK_ROWS", 100)
    monkeypatch.setattr(relational_gradient, "BLOCK_BYTES", 100 * 130 * 4)
    parts = relational.relational_forward(*sides, 0.1, (True, True))
    for a, b, exact in zip(whole, parts, exact_relational(sides, 0.1), strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)
        assert torch.allclose(b.double(), exact, rtol=1e-5, atol=2e-6)


def test_relational_needs_repeats_and_strides():
    sides = relational_sides(18, 33, 7, 9)
    loss, d_student, d_all = relational.relational_forward(*sides, 0.2, (True, True))
    again = relational.relational_forward(*map(strided, sides), 0.2, (True, True))
    assert all(torch.equal(a, b) for a, b in zip((loss, d_student, d_all), again, strict=True))
    only_all = relational.relational_forward(*sides, 0.2, (False, True))
    assert only_all[1].numel() == 0
    assert torch.equal(only_all[2], d_all)
    only_student = relational.relational_forward(*sides, 0.2, (True, False))
    assert only_student[2].numel() == 0
    assert torch.equal(only_student[1], d_student)
    assert [x.numel() for x in relational.relational_forward(*sides, 0.2, (False, False))] == [1, 0, 0]


def test_relational_teacher_in_another_type_and_floor():
    student, teacher, every, teacher_every = relational_sides(16, 40, 8, 8)
    half = relational.relational_forward(
        student, teacher.half(), every, teacher_every.half(), 0.3, (True, True)
    )
    same = relational.relational_forward(
        student, teacher.half().float(), every, teacher_every.half().float(), 0.3, (True, True)
    )
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(half, same, strict=True))
    floor = relational.relational_forward(student, student, every, every, 0.01, (True, True))
    assert abs(float(floor[0])) < 1e-5
    assert float(floor[1].abs().max()) == 0


def test_relational_slope():
    sides = relational_sides(12, 30, 10, 6)
    _, d_student, d_all = relational.relational_forward(*sides, 0.2, (True, True))
    for place, gradient in ((0, d_student), (2, d_all)):

        def loss(x, place=place):
            mine = [*sides[:place], x, *sides[place + 1 :]]
            return relational.relational_forward(*mine, 0.2, (False, False))[0]

        direction = spread(*sides[place].shape, seed=9)
        expected = float((gradient.double() * direction).sum())
        assert slope(loss, sides[place], direction, 1e-2) == pytest.approx(expected, rel=5e-3)


def pointwise_exact(student, teacher, kind, normal):
    student = student.double().requires_grad_()
    loss = reference.pointwise_distillation(student, teacher.double(), kind=kind, normalize=normal)
    return loss.detach(), torch.autograd.grad(loss, student)[0]


def pointwise_dense(student, teacher, kind, normal):
    student = student.clone().requires_grad_()
    s, t = (normalize(x, dim=1) if normal else x for x in (student, teacher))
    cost = {"cosine": lambda: 1 - (s * t).sum(1), "l1": lambda: (s - t).abs(), "l2": lambda: (s - t).square()}
    loss = cost[kind]().sum()
    return loss.detach(), torch.autograd.grad(loss, student)[0]


@pytest.mark.parametrize("normal", [True, False])
@pytest.mark.parametrize("kind", ["cosine", "l1", "l2"])
@pytest.mark.parametrize("shape", [(1, 1), (2, 31), (17, 64), (129, 123), (3, 2100)])
def test_pointwise_is_as_good_as_dense(shape, kind, normal):
    for dtype in DTYPES:
        student, teacher = spread(*shape, seed=1, dtype=dtype), spread(*shape, seed=2, dtype=dtype)
        ours = pointwise.pointwise_forward(student, teacher, kind, normal, True)
        dense = pointwise_dense(student, teacher, kind, normal)
        for got, plain, exact in zip(
            ours, dense, pointwise_exact(student, teacher, kind, normal), strict=True
        ):
            assert got.dtype == torch.float32
            assert_as_good(got, plain, exact, least=0.2)


@pytest.mark.parametrize("kind", ["cosine", "l1", "l2"])
def test_pointwise_rows_of_zeros(kind):
    """They stay zero and get no gradient; a teacher's row of zeros still counts."""
    student, teacher = spread(5, 9, seed=3), spread(5, 9, seed=4)
    student[1], teacher[2], student[3], teacher[3] = 0, 0, 0, 0
    loss, gradient = pointwise.pointwise_forward(student, teacher, kind, True, True)
    exact = reference.pointwise_distillation(student.double(), teacher.double(), kind=kind, normalize=True)
    assert float(loss) == pytest.approx(float(exact), rel=1e-6)
    assert float(gradient[[1, 3]].abs().max()) == 0


def test_pointwise_shows_what_is_no_number():
    student, teacher = spread(5, 9, seed=3), spread(5, 9, seed=4)
    student[1, 2] = torch.nan
    for kind in ("cosine", "l1", "l2"):
        loss, gradient = pointwise.pointwise_forward(student, teacher, kind, True, True)
        assert loss.isnan()
        assert gradient.isnan().any(1).tolist() == [False, True, False, False, False]


def test_pointwise_needs_repeats_and_strides():
    student, teacher = spread(40, 12, seed=5), spread(40, 12, seed=6)
    loss, gradient = pointwise.pointwise_forward(student, teacher, "l2", True, True)
    again = pointwise.pointwise_forward(strided(student), strided(teacher), "l2", True, True)
    assert torch.equal(loss, again[0])
    assert torch.equal(gradient, again[1])
    plain = pointwise.pointwise_forward(student, teacher, "l2", True, False)
    assert torch.equal(loss, plain[0])
    assert plain[1].numel() == 0


@pytest.mark.parametrize("kind", ["cosine", "l1", "l2"])
def test_pointwise_slope(kind):
    student, teacher, direction = (spread(6, 20, seed=s) for s in (7, 8, 9))
    gradient = pointwise.pointwise_forward(student, teacher, kind, True, True)[1]

    def loss(x):
        return pointwise.pointwise_forward(x, teacher, kind, True, False)[0]

    expected = float((gradient.double() * direction).sum())
    assert slope(loss, student, direction, 1e-3) == pytest.approx(expected, rel=2e-2, abs=2e-3)
