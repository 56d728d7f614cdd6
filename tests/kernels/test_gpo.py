"""GPO pooling against the oracle, alone and in padded batches, with equal values."""

import pytest
import torch
from problems import Numbers, value_and_gradients, worst

from d2s.kernels import functional, reference
from d2s.kernels.chunked import gpo as chunked


def problem(batch, tokens, width, seed, dtype, kind="ragged"):
    g = Numbers(seed)
    features = g.randn(batch, tokens, width, dtype=torch.float64).to(dtype)
    weights = g.rand(batch, tokens, dtype=torch.float64).to(dtype)
    if kind == "full":
        mask = torch.ones(batch, tokens, dtype=torch.bool)
    elif kind == "ragged":
        length = g.randint(0, tokens + 1, (batch, 1))
        mask = torch.arange(tokens) < length
    else:
        mask = g.rand(batch, tokens) < 0.6
    return features, weights, mask


@pytest.mark.parametrize("kind", ["full", "ragged", "holes"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 2, 5), (7, 33, 1), (4, 300, 31)])
def test_agrees_with_oracle(shape, dtype, kind):
    features, weights, mask = problem(*shape, 0, dtype, kind)
    ours = value_and_gradients(lambda f, w: functional.gpo_pool(f, w, mask), features, weights)
    theirs = value_and_gradients(lambda f, w: reference.gpo_pool(f, w, mask), features, weights)
    assert worst(ours, theirs) < (1e-10 if dtype == torch.float64 else 2e-5)
    # The features' gradient is one product an entry, so it shows that the order is right to the last token.
    assert torch.equal(ours[1], theirs[1])


def test_gradcheck():
    features, weights, mask = problem(3, 5, 4, 1, torch.float64, "holes")
    inputs = features.requires_grad_(), weights.requires_grad_()
    assert torch.autograd.gradcheck(lambda f, w: functional.gpo_pool(f, w, mask), inputs)


@pytest.mark.on_cpu
def test_threads_do_not_matter():
    features, weights, mask = problem(40, 70, 128, 2, torch.float32)
    threads = torch.get_num_threads()
    try:
        runs = []
        for count in (1, 3):
            torch.set_num_threads(count)
            runs.append(value_and_gradients(lambda f, w: functional.gpo_pool(f, w, mask), features, weights))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.on_cpu
def test_blocks_of_channels_do_not_matter(monkeypatch):
    features, weights, mask = problem(6, 40, 50, 5, torch.float32)
    runs = []
    for entries in (chunked.BLOCK_ENTRIES, 300, 1):
        monkeypatch.setattr(chunked, "BLOCK_ENTRIES", entries)
        runs.append(value_and_gradients(lambda f, w: functional.gpo_pool(f, w, mask), features, weights))
    for other in runs[1:]:
        assert torch.equal(runs[0][0], other[0])
        assert torch.equal(runs[0][1], other[1])
        # Summed over the channels block by block, so in another order.
        torch.testing.assert_close(runs[0][2], other[2], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sample_is_the_same_alone_and_in_any_padded_batch(dtype):
    features, weights, mask = problem(9, 40, 24, 3, dtype, "ragged")
    weights = weights * mask
    together = functional.gpo_pool(features, weights, mask)
    noisy = torch.where(mask[:, :, None], features, 1e6)
    assert torch.equal(together, functional.gpo_pool(noisy, weights, mask))
    # A CPU gives float32 the same bits; a device adds the products up in an order that goes by the padded length.
    on_cpu = features.device.type == "cpu"
    far = {torch.float32: 0 if on_cpu else 1e-5, torch.float64: 1e-12}[dtype]
    for b, length in enumerate(mask.sum(1).tolist()):
        own = slice(b, b + 1), slice(0, length)
        alone = functional.gpo_pool(features[own], weights[own], mask[own])
        assert torch.allclose(together[own[0]], alone, rtol=0, atol=far)


def test_value_does_not_depend_on_gradients_being_wanted():
    features, weights, mask = problem(5, 30, 16, 4, torch.float32)
    plain = functional.gpo_pool(features, weights, mask)
    value = value_and_gradients(lambda f, w: functional.gpo_pool(f, w, mask), features, weights)[0]
    assert torch.equal(plain, value)
    only_weights = value_and_gradients(lambda w: functional.gpo_pool(features, w, mask), weights)
    assert torch.equal(plain, only_weights[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_equal_values_go_by_the_lowest_token(dtype):
    """Signed zeros are equal too: the weights then fall on the tokens in their own order."""
    features = torch.tensor([0.0, -0.0, 3.0, 0.0, -2.0, -2.0, 3.0], dtype=dtype)[
        None, :, None
    ].requires_grad_()
    weights = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]], dtype=dtype)
    functional.gpo_pool(features, weights, torch.ones(1, 7, dtype=torch.bool)).sum().backward()
    assert features.grad.flatten().tolist() == [3.0, 4.0, 1.0, 5.0, 6.0, 7.0, 2.0]


def test_infinite_values_sort_like_others():
    values = torch.tensor([1.0, -torch.inf, torch.inf, -3.0])
    features = values[None, :, None].clone().requires_grad_()
    weights = torch.tensor([[0.0, 1.0, 2.0, 0.0]])
    weights_used = weights.clone()
    functional.gpo_pool(features, weights_used, torch.ones(1, 4, dtype=torch.bool)).sum().backward()
    assert features.grad.flatten().tolist() == [1.0, 0.0, 0.0, 2.0]


def test_non_contiguous_and_half_precision():
    features, weights, mask = problem(4, 20, 12, 5, torch.bfloat16)
    turned = features.transpose(1, 2).contiguous().transpose(1, 2)
    ours = functional.gpo_pool(turned, weights, mask)
    assert ours.dtype == torch.bfloat16
    assert torch.equal(ours, functional.gpo_pool(features, weights, mask))
    exact = reference.gpo_pool(features.double(), weights.double(), mask)
    assert torch.allclose(ours.double(), exact, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_padding_comes_behind_tokens_of_minus_infinity(dtype):
    features = torch.tensor([[[5.0], [-torch.inf], [1.0]]], dtype=dtype)
    mask = torch.tensor([[False, True, True]])
    weights = torch.tensor([[1.0, 2.0, 3.0]], dtype=dtype)
    features.requires_grad_()
    functional.gpo_pool(features, weights, mask).sum().backward()
    assert features.grad.flatten().tolist() == [0.0, 2.0, 1.0]


def test_the_default_type_does_not_matter():
    features, weights, mask = problem(4, 9, 3, 6, torch.float32)
    plain = value_and_gradients(lambda f, w: functional.gpo_pool(f, w, mask), features, weights)
    torch.set_default_dtype(torch.float64)
    try:
        other = value_and_gradients(lambda f, w: functional.gpo_pool(f, w, mask), features, weights)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(plain, other, strict=True))
