"""Hundreds of problems drawn at random for each operator, in float64, against the oracles."""

import math
import random

import pytest
import torch
from problems import KINDS, Numbers, contrastive, image_ids, sides, value_and_gradients, worst

from d2s.kernels import functional, reference

PROBLEMS = 300
LIMIT = 1e-10


def contrastive_problem(name, rng):
    kind = rng.choice(KINDS)
    m, width = rng.choice((1, 2, 3, 7, 12, 17, 24)), rng.choice((1, 2, 3, 8, 13))
    image, text = sides(m, width, rng.randrange(10**6), kind)
    ids = image_ids(m, rng.choice((1, max(1, m // 3), max(1, m - 1), m)), rng.randrange(10**6))
    both = rng.random() < 0.5
    n = m if both else rng.randint(1, m)
    offset = 0 if both else rng.randint(0, m - n)
    own = slice(offset, offset + n)
    # With duplicates similarities are exact sixteenths: margins as exact leave no violation to rounding.
    margin = rng.choice((0.0, 0.25, 0.5, 1.0)) if kind == "duplicated" else rng.random()
    scale = torch.tensor([math.exp(rng.uniform(0, math.log(200)))]).double()
    bias = torch.tensor([rng.uniform(-15, 5)]).double()
    inputs = (image[own], text, scale, bias)

    def run(module):
        return value_and_gradients(
            lambda i, t, s, b: contrastive(
                module, name, i, t, ids[own], ids, margin=margin, scale=s, bias=b, offset=offset, both=both
            ),
            *inputs,
        )

    return run


def relational_problem(_, rng):
    n, width = rng.choice((1, 2, 5, 11, 20)), rng.choice((1, 2, 6, 9))
    student, every = sides(n, width, rng.randrange(10**6), rng.choice(KINDS))
    teacher = sides(n, rng.choice((1, 4, 10)), rng.randrange(10**6))[0]
    count = rng.randint(1, n)
    own = slice(n - count, n)
    temperature = math.exp(rng.uniform(math.log(0.005), 1))

    def run(module):
        return value_and_gradients(
            lambda s, e: module.relational_distillation(s, teacher[own], e, teacher, temperature=temperature),
            student[own],
            every,
        )

    return run


def pointwise_problem(_, rng):
    n, width = rng.choice((1, 2, 5, 20)), rng.choice((1, 2, 7, 31))
    student, teacher = (rng.uniform(0.1, 10) * x for x in sides(n, width, rng.randrange(10**6)))
    kind, normal = rng.choice(functional.KINDS), rng.random() < 0.5
    # In one channel unit vectors are 1 or -1, where l1 stands on its kink.
    normal = normal and width > 1
    if normal and rng.random() < 0.3:
        student[rng.randrange(n)] = 0

    def run(module):
        return value_and_gradients(
            lambda s: module.pointwise_distillation(s, teacher, kind=kind, normalize=normal), student
        )

    return run


def gpo_problem(_, rng):
    g = Numbers(rng.randrange(10**6))
    shape = rng.randint(1, 5), rng.choice((1, 2, 9, 30)), rng.choice((1, 2, 7))
    features = g.randn(shape, dtype=torch.float64)
    if rng.random() < 0.3:
        features = features.round()
    weights = g.rand(shape[:2], dtype=torch.float64)
    mask = g.rand(shape[:2]) < rng.choice((0.1, 0.6, 2.0))

    def run(module):
        return value_and_gradients(lambda f, w: module.gpo_pool(f, w, mask), features, weights)

    return run


MAKERS = {
    "hinge_max": contrastive_problem,
    "hinge_sum": contrastive_problem,
    "info_nce": contrastive_problem,
    "sigmoid": contrastive_problem,
    "relational": relational_problem,
    "pointwise": pointwise_problem,
    "gpo": gpo_problem,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MAKERS)
def test_agrees_with_oracle(name, capsys):
    rng = random.Random(name)
    differences = []
    for _ in range(PROBLEMS):
        run = MAKERS[name](name, rng)
        differences.append(worst(run(functional), run(reference)))
    with capsys.disabled():
        print(f"\n{name}: worst of {PROBLEMS} random problems {max(differences):.1e}")
    assert max(differences) <= LIMIT


@pytest.mark.slow
def test_ranks_agree_with_oracle():
    rng = random.Random(0)
    for _ in range(PROBLEMS):
        n, m, width = rng.randint(1, 12), rng.randint(1, 12), rng.choice((1, 3, 8))
        seed, kind = rng.randrange(10**6), rng.choice(("random", "duplicated"))
        queries, candidates = sides(max(n, m), width, seed, kind)
        ids = image_ids(n, rng.randint(1, 6), seed), image_ids(m, rng.randint(1, 6), seed + 1)
        ours = functional.retrieval_ranks(queries[:n], candidates[:m], query_ids=ids[0], candidate_ids=ids[1])
        assert torch.equal(ours, reference.retrieval_ranks(queries[:n], candidates[:m], None, *ids))
