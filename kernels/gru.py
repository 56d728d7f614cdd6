"""A GRU whose rows all read the same input but start at different time steps. It computes GPO's weights.

The backward direction of GPO's GRU reads the position codes from the last to the first. Sequences of all lengths
read the same codes. A longer sequence only starts at an earlier time step. So the products of the input with the
GRU's weights are computed once for all rows. The equations of Cho et al. (EMNLP 2014) are used as in
`torch.nn.GRU`. The weights have the same shapes as in `torch.nn.GRU`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from d2s.kernels.chunked.common import full_precision
from d2s.kernels.operators.define import refuse_second_derivative


def position_gru(
    data: Tensor, counts: list[int], w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor
) -> Tensor:
    """Returns the GRU's states, of shape (T, n, H), for n rows that all read `data`, of shape (T, C).

    T is the number of time steps, C the width of the input and H the width of the states. At time step s, only
    the first `counts[s]` rows are updated. `counts` has T entries. They must not decrease, and the last entry
    is n. A row's states are zero before its first update. The weights get gradients. `data` gets none.
    """
    assert len(counts) == len(data), "a count for every step"
    assert counts == sorted(counts), "a row takes part from its first step to the end"
    run = packed_gru if data.is_cuda else SharedInputGRU.apply
    with full_precision(data.device):
        return run(data.detach(), counts, w_ih, w_hh, b_ih, b_hh)


class SharedInputGRU(torch.autograd.Function):
    """Computes `position_gru` with one matrix product per time step for all rows. torch's GRU loops over the rows."""

    @staticmethod
    def forward(ctx, data, counts, w_ih, w_hh, b_ih, b_hh):
        steps, rows, width = data.shape[0], counts[-1], w_hh.shape[1]
        given = torch.addmm(b_ih, data, w_ih.t())
        w_hh_t = w_hh.t().contiguous()
        states = data.new_zeros(steps + 1, rows, width)
        gates = data.new_zeros(steps, rows, 4 * width)
        for step, count in enumerate(counts):
            before = states[step, :count]
            recurrent = torch.addmm(b_hh, before, w_hh_t)
            both = torch.sigmoid(recurrent[:, : 2 * width] + given[step, : 2 * width])
            reset, update = both[:, :width], both[:, width:]
            inner = recurrent[:, 2 * width :]
            new = torch.addcmul(given[step, 2 * width :], reset, inner).tanh_()
            torch.lerp(new, before, update, out=states[step + 1, :count])
            torch.cat([both, new, inner], dim=1, out=gates[step, :count])
        ctx.counts = counts
        ctx.save_for_backward(data, w_hh, states, gates)
        return states[1:]

    @staticmethod
    def backward(ctx, grad):
        refuse_second_derivative("shared_input_gru")
        data, w_hh, states, gates = ctx.saved_tensors
        reset, update, new, inner = gates.chunk(4, dim=2)
        # These factors do not depend on the gradient. They are computed for all time steps at once.
        to_new = (1 - update) * (1 - new * new)
        to_inner = to_new * reset
        slopes = torch.stack(
            [to_inner * inner * (1 - reset), (states[:-1] - new) * update * (1 - update), to_inner], dim=2
        )
        steps, rows, _, width = slopes.shape
        recurrent = torch.zeros_like(slopes)
        arriving = torch.zeros_like(grad)
        carried = grad.new_zeros(rows, width)
        for step in range(steps - 1, -1, -1):
            count = ctx.counts[step]
            total = torch.add(carried[:count], grad[step, :count], out=arriving[step, :count])
            through = torch.mul(total[:, None], slopes[step, :count], out=recurrent[step, :count])
            carried = torch.addmm(total * update[step, :count], through.view(count, 3 * width), w_hh)
        given = recurrent.sum(1)
        given[:, 2] = (arriving * to_new).sum(1)
        given = given.view(steps, 3 * width)
        recurrent = recurrent.view(-1, 3 * width)
        before = states[:-1].reshape(-1, width)
        return None, None, given.t() @ data, recurrent.t() @ before, given.sum(0), recurrent.sum(0)


def packed_gru(
    data: Tensor, counts: list[int], w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor
) -> Tensor:
    """Computes `position_gru` with torch's GRU. On a GPU this is one call of cuDNN, not a loop over small kernels."""
    steps, rows = len(counts), counts[-1]
    start = data.new_zeros(1, rows, w_hh.shape[1])
    # cuDNN saves tensors for its backward in training mode only. Without dropout, training mode has no other
    # effect.
    weights, options = [w_ih, w_hh, b_ih, b_hh], (True, 1, 0.0, torch.is_grad_enabled(), False)
    if counts[0] == rows:
        return torch.gru(data[:, None].expand(-1, rows, -1), start, weights, *options, False)[0]
    # torch requires the lengths on the CPU, whatever the default device is.
    host = torch.device("cpu")
    starts = torch.searchsorted(torch.tensor(counts, device=host), torch.arange(1, rows + 1, device=host))
    # torch can pack rows that start together and end at different steps. Here the rows start at different steps
    # and end together. So each row is shifted to step 0, and afterwards its states are shifted back.
    step = torch.arange(steps, device=host)[:, None]
    inside = step < steps - starts
    source = (step + starts)[inside].to(data.device)
    row = torch.arange(rows, device=host).expand(steps, -1)[inside].to(data.device)
    packed = torch.gru(data[source], inside.sum(1), start, weights, *options)[0]
    return data.new_zeros(steps, rows, w_hh.shape[1]).index_put((source, row), packed)
