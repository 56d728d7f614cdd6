"""Pooling: the weights of a length, and the sort over real tokens only."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from d2s.model.gpo import GPO, GRU_WEIGHTS, position_code


def reference_gru(pool: GPO) -> nn.GRU:
    """torch's bidirectional GRU with the weights of the pooling operator."""
    width = pool.weights.width
    gru = nn.GRU(width, width, bidirectional=True, batch_first=True).double()
    state = {
        f"{key}_l0{suffix}": getattr(pool.weights, f"{direction}_{key}").detach()
        for direction, suffix in (("ahead", ""), ("back", "_reverse"))
        for key in GRU_WEIGHTS
    }
    gru.load_state_dict(state)
    return gru


def reference_weights(pool: GPO, length: int) -> torch.Tensor:
    """The weights of one length, from the description: code, BiGRU, mean of directions, score, softmax."""
    width = pool.weights.width
    code = position_code(length, width, torch.device("cpu"), torch.float64)
    states = reference_gru(pool)(code[None])[0][0]
    mean = (states[:, :width] + states[:, width:]) / 2
    return torch.softmax(mean @ pool.weights.score[0] / pool.weights.temperature, dim=0)


def make_pool(width: int = 8) -> GPO:
    torch.manual_seed(0)
    return GPO(width).double()


def test_position_code_is_sine_and_cosine():
    code = position_code(3, 4, torch.device("cpu"), torch.float64)
    assert code[0].tolist() == [0.0, 1.0, 0.0, 1.0]
    expected = [torch.sin(torch.tensor(2.0)), torch.cos(torch.tensor(2.0)), torch.sin(torch.tensor(0.02))]
    assert code[2, :3].tolist() == pytest.approx([float(value) for value in expected], abs=1e-6)


@given(st.sets(st.integers(1, 40), min_size=1, max_size=8))
@settings(max_examples=25, deadline=None)
def test_weights_depend_on_the_length_only(lengths):
    pool = make_pool()
    ordered = sorted(lengths, reverse=True)
    table = pool.weights(ordered)
    for row, length in zip(table, ordered, strict=True):
        torch.testing.assert_close(row[:length], reference_weights(pool, length), rtol=0, atol=1e-13)
        assert row[length:].eq(0).all()


def test_gradient_of_the_weights():
    pool = make_pool(4)
    parameters = {name: value.detach() for name, value in pool.weights.named_parameters()}
    names = list(parameters)

    def weights(*values):
        return torch.func.functional_call(pool.weights, dict(zip(names, values, strict=True)), ([6, 5, 2],))

    inputs = [parameters[name].clone().requires_grad_() for name in names]
    assert torch.autograd.gradcheck(weights, inputs)


def naive_pool(pool: GPO, tokens: torch.Tensor) -> torch.Tensor:
    """One sample (K, D), without padding."""
    ordered = tokens.sort(dim=0, descending=True).values
    return (ordered * reference_weights(pool, tokens.shape[0])[:, None]).sum(0)


def release_pool(pool: GPO, features: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """As the authors' release pads: pads are -10000 before the sort and 0 after, scores of pads are -10000."""
    batch, longest, _ = features.shape
    width = pool.weights.width
    real = torch.arange(longest) < lengths[:, None]
    code = position_code(longest, width, torch.device("cpu"), torch.float64).expand(batch, -1, -1)
    packed = nn.utils.rnn.pack_padded_sequence(
        code.masked_fill(~real[:, :, None], 0), lengths, batch_first=True, enforce_sorted=False
    )
    states = nn.utils.rnn.pad_packed_sequence(reference_gru(pool)(packed)[0], batch_first=True)[0]
    score = ((states[:, :, :width] + states[:, :, width:]) / 2) @ pool.weights.score[0]
    weights = torch.softmax(score.masked_fill(~real, -10000) / pool.weights.temperature, dim=1)
    ordered = features.masked_fill(~real[:, :, None], -10000).sort(dim=1, descending=True).values
    return (ordered.masked_fill(~real[:, :, None], 0) * weights[:, :, None]).sum(1)


@pytest.mark.parametrize("training", [True, False])
def test_pooling_equals_each_sample_alone_and_the_release(training):
    pool = make_pool().train(training)
    lengths = torch.tensor([4, 7, 4, 1])
    features = torch.randn(4, 7, 3, dtype=torch.float64)
    mask = torch.arange(7) < lengths[:, None]
    pooled = pool(features, mask)
    for row, length in enumerate(lengths.tolist()):
        torch.testing.assert_close(pooled[row], naive_pool(pool, features[row, :length]), atol=1e-12, rtol=0)
    torch.testing.assert_close(pooled, release_pool(pool, features, lengths), atol=1e-12, rtol=0)


def test_dropped_tokens_may_stand_anywhere():
    pool = make_pool()
    features = torch.randn(1, 6, 3, dtype=torch.float64)
    mask = torch.tensor([[True, False, True, True, False, True]])
    torch.testing.assert_close(pool(features, mask)[0], naive_pool(pool, features[0, mask[0]]))


def test_kept_weights_follow_the_parameters():
    pool = make_pool().eval()
    features, mask = torch.randn(2, 5, 3, dtype=torch.float64), torch.ones(2, 5, dtype=torch.bool)
    with torch.no_grad():
        first = pool(features, mask)
        assert len(pool._cache) == 1
        assert torch.equal(first, pool(features, mask))
        pool.weights.score.add_(1.0)
        changed = pool(features, mask)
    assert not torch.allclose(first, changed)
    torch.testing.assert_close(changed[0], naive_pool(pool, features[0]))


def test_weights_are_computed_in_float32_under_bfloat16():
    pool = make_pool().float()
    exact = pool.weights([30, 7])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(pool.weights([30, 7]), exact)
    assert pool.bfloat16().weights([30, 7]).dtype == torch.float32
