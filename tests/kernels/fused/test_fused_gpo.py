"""GPO pooling in Triton: the oracle, ties, holes, samples without tokens, and plain torch in the same type."""

import pytest
import torch
from judge import DTYPES, assert_as_good, slope, spread, strided
from problems import Numbers

from d2s.kernels import reference
from d2s.kernels.fused import gpo


def problem(batch, tokens, width, dtype, kind="holes"):
    """features, weights, mask, grad."""
    g = Numbers(tokens)
    features, grad = (
        spread(batch, tokens, width, seed=1, dtype=dtype),
        spread(batch, width, seed=2, dtype=dtype),
    )
    weights = g.rand(batch, tokens).to(dtype)
    if kind == "full":
        mask = torch.ones(batch, tokens, dtype=torch.bool)
    elif kind == "ragged":
        mask = torch.arange(tokens) < g.randint(0, tokens + 1, (batch, 1))
    else:
        mask = g.rand(batch, tokens) < 0.6
    return features, weights, mask, grad


def fused(features, weights, mask, grad, need=(True, True)):
    pooled, order, value = gpo.gpo_forward(features, weights, mask, need)
    gradients = gpo.gpo_backward(grad, features, weights, mask, order, value, need)
    return pooled, *gradients


def exact(features, weights, mask, grad):
    features, weights = (x.double().requires_grad_() for x in (features, weights))
    pooled = reference.gpo_pool(features, weights, mask)
    return pooled.detach(), *torch.autograd.grad(pooled, (features, weights), grad.double())


def dense(features, weights, mask, grad):
    """As anybody would write it, in the type of the inputs."""
    features, weights = (x.clone().requires_grad_() for x in (features, weights))
    lowest = features.masked_fill(~mask[:, :, None], -torch.inf)
    ordered = lowest.sort(dim=1, descending=True, stable=True).values.masked_fill(
        torch.arange(mask.shape[1])[None, :, None] >= mask.sum(1)[:, None, None], 0
    )
    pooled = (ordered * weights[:, :, None]).sum(1)
    return pooled.detach(), *torch.autograd.grad(pooled, (features, weights), grad)


@pytest.mark.parametrize("kind", ["full", "ragged", "holes"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 2, 31), (2, 7, 64), (2, 33, 123), (2, 129, 17)])
def test_as_good_as_dense(shape, kind):
    for dtype in DTYPES:
        inputs = problem(*shape, dtype, kind)
        ours, oracle = fused(*inputs), exact(*inputs)
        assert [x.dtype for x in ours] == [dtype] * 3
        for got, plain, truth in zip(ours, dense(*inputs), oracle, strict=True):
            assert_as_good(got, plain, truth, 2e-6)
        # One product an entry: where the order is right to the last token, this is exact.
        assert torch.equal(ours[1], oracle[1].to(dtype))


def test_many_tokens():
    inputs = problem(1, 577, 3, torch.bfloat16)
    ours, oracle = fused(*inputs), exact(*inputs)
    assert torch.equal(ours[1], oracle[1].to(torch.bfloat16))
    assert_as_good(ours[0], dense(*inputs)[0], oracle[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_values_go_by_the_lowest_token(dtype):
    """Signed zeros are equal too: the weights then fall on the tokens in their own order."""
    features = torch.tensor([0.0, -0.0, 3.0, 0.0, -2.0, -2.0, 3.0], dtype=dtype)[None, :, None]
    weights = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]], dtype=dtype)
    ours = fused(features, weights, torch.ones(1, 7, dtype=torch.bool), torch.ones(1, 1, dtype=dtype))
    assert ours[1].flatten().tolist() == [3.0, 4.0, 1.0, 5.0, 6.0, 7.0, 2.0]
    assert ours[2].flatten().tolist() == [3.0, 3.0, 0.0, 0.0, 0.0, -2.0, -2.0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_infinities_and_what_is_no_number(dtype):
    features = torch.tensor([1.0, -torch.inf, torch.inf, -3.0, 2.0], dtype=dtype)[None, :, None]
    weights = torch.tensor([[0.0, 1.0, 2.0, 3.0, 9.0]], dtype=dtype)
    mask = torch.tensor([[True, True, True, True, False]])
    grad = torch.ones(1, 1, dtype=dtype)
    assert fused(features, weights, mask, grad)[1].flatten().tolist() == [1.0, 3.0, 0.0, 2.0, 0.0]
    # Of either sign it is the largest, and the sample's alone.
    signs = torch.tensor([torch.nan, 1.0, torch.nan]).to(dtype).copysign(torch.tensor([-1.0, 1.0, 1.0]))
    features = torch.stack([signs, torch.ones(3, dtype=dtype)])[:, :, None]
    weights = torch.tensor([[1.0, 2.0, 3.0]], dtype=dtype).expand(2, 3)
    ours = fused(features, weights, torch.ones(2, 3, dtype=torch.bool), grad.expand(2, 1))
    assert ours[0].isnan().flatten().tolist() == [True, False]
    assert ours[1].flatten().tolist() == [1.0, 3.0, 2.0, 1.0, 2.0, 3.0]


def test_sample_without_tokens_is_zero():
    """Even where what is left out, and its weights, are no numbers."""
    features, weights, mask, grad = problem(3, 5, 6, torch.float32, "full")
    mask[1], features[1], weights[1] = False, torch.nan, torch.nan
    mask[2, 3:], features[2, 3:], weights[2, 3:], grad[1] = False, torch.nan, torch.inf, torch.inf
    pooled, d_features, d_weights = fused(features, weights, mask, grad)
    assert all(float(x[1].abs().max()) == 0 for x in (pooled, d_features, d_weights))
    assert float(d_features[2, 3:].abs().max()) == 0
    assert float(d_weights[2, 3:].abs().max()) == 0
    own = exact(features[2:, :3], weights[2:, :3], mask[2:, :3], grad[2:])
    assert torch.allclose(pooled[2:].double(), own[0], atol=1e-6)


def test_order_is_a_permutation():
    """So every place of the gradient is written once, whatever the memory held before."""
    features, weights, mask, _ = problem(3, 21, 5, torch.float32)
    order = gpo.gpo_forward(features, weights, mask, (True, False))[1].view(3, 5, 21)
    assert torch.equal(order.sort(2).values, torch.arange(21, dtype=torch.int16).expand(3, 5, 21))
    real = mask[:, None].expand(3, 5, 21).gather(2, order.long())
    assert torch.equal(real, (torch.arange(21) < mask.sum(1, keepdim=True))[:, None].expand(3, 5, 21))


def test_needs_repeats_and_strides():
    inputs = problem(2, 12, 20, torch.float32)
    ours = fused(*inputs)
    again = fused(*map(strided, inputs[:2]), strided(inputs[2].int()).bool(), strided(inputs[3]))
    assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))
    features_only, weights_only = fused(*inputs, (True, False)), fused(*inputs, (False, True))
    assert torch.equal(features_only[1], ours[1])
    assert torch.equal(weights_only[2], ours[2])
    assert features_only[2].numel() == weights_only[1].numel() == 0
    pooled, order, value = gpo.gpo_forward(*inputs[:3], (False, False))
    assert torch.equal(pooled, ours[0])
    assert order.numel() == value.numel() == 0


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_nothing_to_pool(shape):
    batch, tokens, width = shape
    inputs = (
        torch.ones(shape),
        torch.ones(batch, tokens),
        torch.ones(batch, tokens) > 0,
        torch.ones(batch, width),
    )
    pooled, d_features, d_weights = fused(*inputs)
    assert pooled.shape == (batch, width)
    assert not pooled.any()
    assert d_features.shape == shape
    assert not d_weights.any()


def test_more_tokens_than_fit_go_to_the_chunked_one(monkeypatch):
    inputs = problem(2, 12, 5, torch.float32)
    ours = fused(*inputs)
    monkeypatch.setattr(gpo, "TOKENS", 8)
    chunked = fused(*inputs)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(ours, chunked, strict=True))


def test_slope():
    features, weights, mask, grad = problem(2, 9, 4, torch.float32)
    _, d_features, d_weights = fused(features, weights, mask, grad)

    def pooled(f, w):
        return (gpo.gpo_forward(f, w, mask, (False, False))[0].double() * grad).sum()

    direction = spread(2, 9, 4, seed=3)
    expected = float((d_features.double() * direction).sum())
    assert slope(lambda x: pooled(x, weights), features, direction, 1e-4) == pytest.approx(expected, rel=2e-2)
    direction = spread(2, 9, seed=4)
    expected = float((d_weights.double() * direction).sum())
    assert slope(lambda x: pooled(features, x), weights, direction, 1e-2) == pytest.approx(expected, rel=1e-3)
