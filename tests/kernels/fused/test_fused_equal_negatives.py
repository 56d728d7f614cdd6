"""A negative that equals its positive violates a margin of 0 by exactly 0: both are computed in the same order.

`d2s.kernels.tune` keeps the tiles of the kernels that compare such sums alike; on a device this test checks it.
"""

import pytest
import torch
from judge import DTYPES
from problems import Numbers
from torch.nn.functional import normalize

from d2s import kernels


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [80, 512])
def test_negatives_equal_to_their_positives_cost_nothing(dtype, width, monkeypatch):
    """Every pair is there twice, and no other negative comes near."""
    monkeypatch.setenv("D2S_KERNELS", "triton")
    g = Numbers(0)
    image, noise = (normalize(g.randn(65, width), dim=1) for _ in range(2))
    text = normalize(image + 0.1 * noise, dim=1)
    image, text = (x.repeat(2, 1).to(dtype) for x in (image, text))
    assert float(kernels.hinge_loss(image, text, torch.arange(130), margin=0.0, hardest=False)) == 0
