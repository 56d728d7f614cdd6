"""The GRU over one shared input: both implementations, and torch's own over each row by itself."""

import pytest
import torch
from torch import nn

from d2s.kernels.gru import SharedInputGRU, packed_gru, position_gru


@pytest.mark.parametrize("run", [position_gru, SharedInputGRU.apply, packed_gru])
@pytest.mark.parametrize("counts", [[1] * 9, [1, 1, 2, 2, 2, 4, 4, 5, 5], [3], [0, 0, 2]])
def test_agrees_with_torch_row_by_row(run, counts):
    torch.manual_seed(0)
    gru = nn.GRU(6, 5).double()
    data = torch.randn(len(counts), 6, dtype=torch.float64)
    target = torch.randn(len(counts), counts[-1], 5, dtype=torch.float64)
    expected = []
    for row in range(counts[-1]):
        start = sum(count <= row for count in counts)
        expected.append(torch.cat([torch.zeros(start, 5, dtype=torch.float64), gru(data[start:])[0]]))
    expected = torch.stack(expected, dim=1)
    out = run(data, counts, *gru.parameters())
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-13)
    gradients, wanted = (
        torch.autograd.grad((x * target).sum(), list(gru.parameters())) for x in (out, expected)
    )
    torch.testing.assert_close(gradients, wanted, rtol=0, atol=1e-13)


def test_no_silent_second_derivative_and_no_gradient_of_the_data():
    gru = nn.GRU(6, 5)
    data = torch.randn(4, 6, requires_grad=True)
    out = position_gru(data, [1, 1, 2, 2], *gru.parameters())
    # cuDNN's refuses by itself, when the second derivative is asked for.
    if not data.is_cuda:
        with pytest.raises(RuntimeError, match="shared_input_gru: its gradient was to be differentiated"):
            torch.autograd.grad(out.sum(), list(gru.parameters()), create_graph=True)
    assert not position_gru(data, [1, 1, 2, 2], *(x.detach() for x in gru.parameters())).requires_grad


def test_autocast_leaves_it_alone():
    gru = nn.GRU(6, 5)
    data = torch.randn(4, 6)
    plain = position_gru(data, [1, 1, 2, 2], *gru.parameters())
    with torch.autocast(data.device.type, dtype=torch.bfloat16):
        assert torch.equal(position_gru(data, [1, 1, 2, 2], *gru.parameters()), plain)
