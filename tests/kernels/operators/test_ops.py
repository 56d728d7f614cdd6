"""The operators of torch: registration, compilation, second derivatives, what is saved, and who computes."""

import logging

import pytest
import torch
from problems import Numbers, image_ids, sides, value_and_gradients
from torch.library import opcheck

from d2s.kernels import functional
from d2s.kernels.operators import dispatch, ops


def float_inputs(dtype=torch.float32):
    """(image (9, 5), text (9, 5), scale (1,), bias (1,)), with gradient."""
    image, text = sides(9, 5, 0, dtype=dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return [
        x.requires_grad_() for x in (image, text, torch.full((1,), 9.0).to(wide), -torch.ones(1).to(wide))
    ]


def targets():
    """(ids (9,), teacher (9, 5), mask (3, 4)), which have no gradient."""
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 1, 0], [0, 0, 0, 0]]) > 0
    return image_ids(9, 6, 0), sides(9, 5, 1)[0], mask


def gpo_inputs(dtype=torch.float32):
    g = Numbers(0)
    features, weights = g.randn(3, 4, 5), g.rand(3, 4)
    return [x.to(dtype).requires_grad_() for x in (features, weights)]


FUNCTIONALS = ("hinge_max", "hinge_sum", "info_nce", "sigmoid", "relational", "pointwise", "gpo")


def functionals():
    """name: (function of float inputs, those inputs by their type); every functional that has a gradient."""
    ids, teacher, mask = targets()
    return {
        "hinge_max": (lambda i, t: functional.hinge_loss(i, t, ids), lambda d: float_inputs(d)[:2]),
        "hinge_sum": (
            lambda i, t: functional.hinge_loss(i, t, ids, hardest=False),
            lambda d: float_inputs(d)[:2],
        ),
        "info_nce": (
            lambda i, t, s: functional.info_nce_loss(i, t, ids, scale=s),
            lambda d: float_inputs(d)[:3],
        ),
        "sigmoid": (lambda i, t, s, b: functional.sigmoid_loss(i, t, ids, scale=s, bias=b), float_inputs),
        "relational": (
            lambda s, every: functional.relational_distillation(
                s[2:6], teacher[2:6], every, teacher, temperature=0.3
            ),
            lambda d: float_inputs(d)[:2],
        ),
        "pointwise": (
            lambda s: functional.pointwise_distillation(s, teacher),
            lambda d: float_inputs(d)[:1],
        ),
        "gpo": (lambda f, w: functional.gpo_pool(f, w, mask), gpo_inputs),
    }


def operator_calls(dtype):
    """(operator, arguments) for every operator, with gradients wanted where there are any."""
    image, text, scale, bias = float_inputs(dtype)
    ids, _, mask = targets()
    contrastive = (image, text, ids, ids)
    part = (image[2:7].detach().requires_grad_(), text, ids[2:7], ids)
    features, weights = gpo_inputs(dtype)
    plain = [x.detach() for x in (image, text, scale, bias, features, weights)]
    *_, at, active, column_at, column_active = ops.hinge_max(*plain[:2], ids, ids, 0, True, 0.2)
    _, *statistics = ops.info_nce(*plain[:2], ids, ids, 0, True, plain[2])
    pooled, order, value = ops.gpo(*plain[4:], mask, True, True)
    one = torch.ones((), dtype=statistics[0].dtype)
    winners = (at, active, column_at, column_active)
    return [
        (ops.hinge_max, (*contrastive, 0, True, 0.2)),
        (ops.hinge_max, (*part, 2, False, 0.2)),
        (ops.hinge_max_backward, (one, *plain[:2], *winners, 0, True, True)),
        (ops.hinge_max_backward, (one, *plain[:2], *winners, 0, False, True)),
        (ops.hinge_sum, (*contrastive, 0, True, 0.2, True, True)),
        (ops.hinge_sum, (part[0], text.detach(), *part[2:], 2, False, 0.2, True, False)),
        (ops.info_nce, (*contrastive, 0, True, scale)),
        (ops.info_nce, (*part, 2, False, scale)),
        (ops.info_nce_backward,
         (*plain[:2], ids, ids, 0, True, plain[2], *statistics, one, True, False, True)),
        (ops.sigmoid, (*contrastive, 0, False, scale, bias, True, True, True, True)),
        (ops.sigmoid, (image.detach(), text, ids, ids, 0, False, scale.detach(), bias, False, True, False, True)),
        (ops.relational, (image, plain[1], text, plain[0], 0.3, True, True)),
        (ops.relational, (image, plain[1], plain[1], plain[0], 0.3, True, False)),
        (ops.pointwise, (image, plain[1], "l2", True, True)),
        (ops.gpo, (features, weights, mask, True, True)),
        (ops.gpo, (features, plain[5], mask, True, False)),
        (ops.gpo_backward, (torch.ones_like(pooled), plain[4], plain[5], mask, order, value, True, True)),
        (ops.retrieval_ranks, (*plain[:2], None, None, ids, ids)),
        (ops.retrieval_ranks, (*plain[:2], torch.arange(10), torch.arange(9), None, None)),
    ]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_every_operator_passes_opcheck(dtype):
    calls = operator_calls(dtype)
    assert {op.name() for op, _ in calls} == {
        f"d2s::{name}" for name in vars(ops) if isinstance(getattr(ops, name), torch._ops.OpOverload)
    }
    for operator, arguments in calls:
        opcheck(operator, arguments)


@pytest.mark.parametrize("name", FUNCTIONALS)
def test_compiled_equals_eager_to_the_last_bit(name):
    function, inputs = functionals()[name]
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for dtype in (torch.float32, torch.bfloat16):
        eager, other = (value_and_gradients(f, *inputs(dtype)) for f in (function, compiled))
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(eager, other, strict=True))


@pytest.mark.slow
def test_compiled_to_machine_code_equals_eager_to_the_last_bit():
    """All in one graph: starting the compiler takes most of the time."""
    cases = functionals()
    inputs = {name: make(torch.float32) for name, (_, make) in cases.items()}
    counts = [len(x) for x in inputs.values()]

    def every(*leaves):
        groups, start = [], 0
        for count in counts:
            groups.append(leaves[start : start + count])
            start += count
        functions = [function for function, _ in cases.values()]
        return torch.cat([f(*group).flatten() for f, group in zip(functions, groups, strict=True)])

    leaves = [x for group in inputs.values() for x in group]
    torch._dynamo.reset()
    with torch._inductor.config.patch(compile_threads=1, cpp_cache_precompile_headers=False):
        compiled = value_and_gradients(torch.compile(every, fullgraph=True), *leaves)
    assert all(torch.equal(a, b) for a, b in zip(value_and_gradients(every, *leaves), compiled, strict=True))


def test_compiled_ranks_equal_eager():
    image, text = (x.detach() for x in float_inputs()[:2])
    ids, *_ = targets()

    def ranks(q, c, ids):
        return functional.retrieval_ranks(q, c, query_ids=ids, candidate_ids=ids)

    torch._dynamo.reset()
    compiled = torch.compile(ranks, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(image, text, ids), ranks(image, text, ids))


def test_one_graph_serves_several_batch_sizes():
    torch._dynamo.reset()
    compiled = torch.compile(functional.hinge_loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (5, 12, 33):
        image, text = sides(n, 6, n, dtype=torch.float32)
        ids = torch.arange(n)
        assert torch.equal(compiled(image, text, ids), functional.hinge_loss(image, text, ids))


@pytest.mark.parametrize("name", FUNCTIONALS)
def test_gradcheck(name):
    function, inputs = functionals()[name]
    assert torch.autograd.gradcheck(function, inputs(torch.float64))


@pytest.mark.parametrize("name", FUNCTIONALS)
def test_second_derivative_is_an_error_and_not_zero(name):
    function, inputs = functionals()[name]
    leaves = inputs(torch.float64)
    out = function(*leaves).sum()
    # At the first gradient already: the second, with respect to named leaves, would never reach an error.
    with pytest.raises(RuntimeError, match=r"d2s::\w+: its gradient was to be differentiated"):
        torch.autograd.grad(out, leaves, create_graph=True)


def test_gradient_of_an_operator_for_a_gradient_is_an_error():
    image, text = float_inputs()[:2]
    ids, *_ = targets()
    winners = ops.hinge_max(image, text, ids, ids, 0, True, 0.2)[1:]
    made = ops.hinge_max_backward(torch.ones(()), image, text, *winners, 0, True, True)
    with pytest.raises(RuntimeError, match="d2s::hinge_max_backward: its gradient was to be differentiated"):
        made[1].sum().backward()


@pytest.mark.parametrize("name", FUNCTIONALS)
def test_repeats_are_equal_and_nothing_is_saved_without_gradients(name):
    function, inputs = functionals()[name]
    leaves = inputs(torch.float32)
    first = value_and_gradients(function, *leaves)
    for _ in range(10):
        assert all(
            torch.equal(a, b) for a, b in zip(first, value_and_gradients(function, *leaves), strict=True)
        )
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        with torch.no_grad():
            silent = function(*leaves)
        assert not function(*(x.detach() for x in leaves)).requires_grad
        assert not saved
        assert torch.equal(function(*leaves), first[0])
        assert saved
    assert torch.equal(silent, first[0])


@pytest.mark.parametrize("name", FUNCTIONALS)
def test_each_input_alone_gets_the_same_gradient(name):
    function, inputs = functionals()[name]
    leaves = [x.detach() for x in inputs(torch.float32)]
    whole = value_and_gradients(function, *leaves)
    for k in range(len(leaves)):

        def alone(x, k=k):
            return function(*leaves[:k], x, *leaves[k + 1 :])

        value, gradient = value_and_gradients(alone, leaves[k])
        assert torch.equal(value, whole[0])
        assert torch.equal(gradient, whole[1 + k])


def test_only_what_is_needed_is_made():
    image, text, scale, bias = (x.detach() for x in float_inputs())
    ids, _, mask = targets()
    made = ops.sigmoid(image, text, ids, ids, 0, False, scale, bias, False, True, False, False)
    assert [x.numel() for x in made] == [1, 0, text.numel(), 0, 0]
    # For the weights' gradient Triton and float64 keep the sorted values, a CPU the order to gather them by.
    for dtype in (torch.float64, torch.float32):
        features, weights = gpo_inputs(dtype)
        values = dtype == torch.float64 or dispatch.implementation(features.device) == "triton"
        kept = [x.numel() for x in ops.gpo(features, weights, mask, False, True)]
        assert kept == ([15, 0, 60] if values else [15, 60, 0])


def test_gradient_that_was_not_announced_is_an_error():
    image, text = float_inputs()[:2]
    ids, *_ = targets()
    loss = ops.hinge_sum(image, text, ids, ids, 0, True, 0.2, True, False)[0]
    with pytest.raises(RuntimeError, match="d2s::hinge_sum: argument 1 needs a gradient"):
        loss.backward()


@pytest.mark.on_cpu
def test_who_computes_depends_on_device_and_type(monkeypatch):
    monkeypatch.setattr(dispatch, "_has_triton", lambda: True)
    monkeypatch.delenv("D2S_KERNELS", raising=False)
    assert dispatch.implementation("cuda:1") == "triton"
    assert dispatch.implementation("cuda", torch.float64) == "chunked"
    assert dispatch.implementation("cpu", torch.bfloat16) == "chunked"
    monkeypatch.setattr(dispatch, "_has_triton", lambda: False)
    assert dispatch.implementation(torch.device("cuda", 0)) == "chunked"
    monkeypatch.setenv("D2S_KERNELS", "triton")
    assert dispatch.implementation("cpu", torch.float64) == "chunked"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert dispatch.implementation("cpu") == "triton"
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match=r"^D2S_KERNELS: triton computes on CUDA, not on cpu") as error:
        functional.hinge_loss(*(x.detach() for x in float_inputs()[:2]), targets()[0])
    assert "\n" not in str(error.value)


def test_the_one_who_computes_is_logged_once(monkeypatch, caplog):
    dispatch.load.cache_clear()
    monkeypatch.delenv("D2S_KERNELS", raising=False)
    image, text = (x.detach() for x in float_inputs()[:2])
    ids, *_ = targets()
    with caplog.at_level(logging.INFO, logger="d2s.kernels"):
        for _ in range(3):
            functional.hinge_loss(image, text, ids)
            functional.hinge_loss(image, text, ids, hardest=False)
    assert [record.message for record in caplog.records] == [
        f"kernels: {dispatch.implementation(image.device)}"
    ]
