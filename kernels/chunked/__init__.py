"""Any device, any float type: a few rows of the similarity matrix at a time, with hand-written backwards."""

from d2s.kernels.chunked.gpo import gpo_pool
from d2s.kernels.chunked.hinge import hinge_loss
from d2s.kernels.chunked.info_nce import info_nce_loss
from d2s.kernels.chunked.pointwise import pointwise_distillation
from d2s.kernels.chunked.ranks import retrieval_ranks
from d2s.kernels.chunked.relational import relational_distillation
from d2s.kernels.chunked.sigmoid import sigmoid_loss

__all__ = [
    "gpo_pool",
    "hinge_loss",
    "info_nce_loss",
    "pointwise_distillation",
    "relational_distillation",
    "retrieval_ranks",
    "sigmoid_loss",
]
