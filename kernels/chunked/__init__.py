"""Losses on any device and for any float type: a few rows of the similarity matrix at a time, gradients by hand.

Raw functions: tensors in, fresh tensors out, no automatic differentiation; `d2s.kernels.operators.ops` makes
operators of them. Gradients that are not needed come back empty.
"""

from d2s.kernels.chunked.gpo import gpo_backward, gpo_forward, gpo_saves_values
from d2s.kernels.chunked.hinge import hinge_max_backward, hinge_max_forward, hinge_sum_forward
from d2s.kernels.chunked.info_nce import info_nce_backward, info_nce_forward
from d2s.kernels.chunked.pointwise import pointwise_forward
from d2s.kernels.chunked.ranks import retrieval_ranks
from d2s.kernels.chunked.relational import relational_forward
from d2s.kernels.chunked.sigmoid import sigmoid_forward

__all__ = [
    "gpo_backward",
    "gpo_forward",
    "gpo_saves_values",
    "hinge_max_backward",
    "hinge_max_forward",
    "hinge_sum_forward",
    "info_nce_backward",
    "info_nce_forward",
    "pointwise_forward",
    "relational_forward",
    "retrieval_ranks",
    "sigmoid_forward",
]
