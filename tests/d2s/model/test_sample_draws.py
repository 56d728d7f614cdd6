"""Token dropout: bits of the loader's hash, and draws that belong to the sample."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_towers import pictures, tiny_config, tiny_model

from d2s.model.sample_draws import token_mask, uniforms
from d2s.shards.order import draws


@given(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=20), st.integers(1, 50))
@settings(max_examples=50, deadline=None)
def test_twin_of_the_loaders_hash(states, count):
    state = np.array(states, np.uint64)
    expected = draws.to_uniform(draws.expand(state, count))
    assert np.array_equal(uniforms(torch.from_numpy(state.view(np.int64)), count).numpy(), expected)


def seeds(count: int, seed: int = 3) -> torch.Tensor:
    """Draw seeds as the loader makes them."""
    return torch.from_numpy(draws.bits(seed, 0, np.arange(count), "tokens")[:, 0].view(np.int64))


def test_shares_of_dropped_tokens():
    config = tiny_config()
    kept = token_mask(seeds(4000), 200, config)
    rate = 1 - kept.double().mean(1)
    touched = rate > 0
    # 4000 draws of p = 0.8 lie within 0.02 but for one time in 600.
    assert abs(touched.double().mean() - 0.8) < 0.02
    assert abs(rate[touched].mean() - 0.12) < 0.005
    assert rate.max() < 0.35


def test_one_token_always_stays():
    config = tiny_config(token_dropout=1.0, token_dropout_min=1.0, token_dropout_max=1.0)
    assert token_mask(seeds(50), 9, config).sum(1).tolist() == [1] * 50


def test_draws_belong_to_the_sample_not_the_batch():
    model = tiny_model().double().train()
    for module in model.image_encoder.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    images, seed = pictures(6), seeds(6)
    together = model.forward_image(images, seed)
    assert not torch.allclose(together, model.forward_image(images, None))
    order = [4, 1, 0]
    parts = model.forward_image(images[order], seed[order])
    torch.testing.assert_close(parts, together[order], atol=1e-12, rtol=0)
    torch.testing.assert_close(model.eval().forward_image(images, seed), model.forward_image(images))
