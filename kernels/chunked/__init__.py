"""Implements all kernels with torch and numpy, for any device and float type.

Only a few rows of the similarity matrix are in memory at a time. The functions compute gradients by explicit
formulas, without autograd. `d2s.kernels.operators.ops` wraps them as torch operators. Arguments named `need`
hold a bool for each gradient: if it is false, the function returns an empty tensor for this gradient.
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
