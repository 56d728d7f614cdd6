"""Implements all kernels with Triton for CUDA devices, and for CPU tensors if TRITON_INTERPRET=1.

Embeddings are float32, bfloat16 or float16. Products have this type, with float32 accumulators. No function
uses autograd or waits for the device. `d2s.kernels.compile` compiles `ALL_SPECS`. Arguments named `need` hold
a bool for each gradient: if it is false, the function returns an empty tensor for this gradient.
"""

from d2s.kernels.fused import (
    gpo,
    hinge_gather,
    hinge_lists,
    hinge_max,
    hinge_sum,
    info_nce,
    info_nce_gradient,
    pointwise,
    positives,
    products_kernel,
    ranks,
    relational,
    relational_gradient,
    sigmoid,
)
from d2s.kernels.fused.gpo import gpo_backward, gpo_forward, gpo_saves_values
from d2s.kernels.fused.hinge_gather import hinge_max_backward
from d2s.kernels.fused.hinge_max import hinge_max_forward
from d2s.kernels.fused.hinge_sum import hinge_sum_forward
from d2s.kernels.fused.info_nce import info_nce_forward
from d2s.kernels.fused.info_nce_gradient import info_nce_backward
from d2s.kernels.fused.pointwise import pointwise_forward
from d2s.kernels.fused.ranks import retrieval_ranks
from d2s.kernels.fused.relational import relational_forward
from d2s.kernels.fused.sigmoid import sigmoid_forward

_CONTRASTIVE = (hinge_max, hinge_gather, hinge_sum, hinge_lists, info_nce, info_nce_gradient, sigmoid)
_OTHERS = (positives, products_kernel, relational, relational_gradient, pointwise, gpo, ranks)
ALL_SPECS = [spec for module in (*_CONTRASTIVE, *_OTHERS) for spec in module.SPECS]

__all__ = [
    "ALL_SPECS",
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
