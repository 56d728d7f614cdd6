"""The rank of each query's best positive, by counting; ties and NaN count against the model."""

import torch
from torch import Tensor

from d2s.kernels.chunked.common import SamePairs, Sweep, full_precision, upcast


def retrieval_ranks(
    queries: Tensor,
    candidates: Tensor,
    positives: tuple[Tensor, Tensor] | None,
    query_ids: Tensor | None,
    candidate_ids: Tensor | None,
) -> Tensor:
    """See `d2s.kernels.functional.retrieval_ranks`."""
    same = None if positives is not None else SamePairs(query_ids, candidate_ids)
    ranks = torch.empty(queries.shape[0], dtype=torch.int64, device=queries.device)
    with full_precision(queries.device):
        for start, stop, s in Sweep(upcast(queries), upcast(candidates)):
            mask = torch.zeros(s.shape, dtype=torch.bool, device=s.device)
            if same is not None:
                same.fill(mask, start, stop, True)
            else:
                starts, indices = positives
                count = starts[start + 1 : stop + 1] - starts[start:stop]
                rows = torch.repeat_interleave(torch.arange(stop - start, device=s.device), count)
                mask[rows, indices[starts[start] : starts[stop]]] = True
            best = torch.where(mask, s, -torch.inf).amax(1, keepdim=True)
            # Everything that is not strictly below the best positive stands before it: ties, and NaN.
            below = (s < best) | mask
            ranks[start:stop] = s.shape[1] - below.sum(1)
    return ranks
