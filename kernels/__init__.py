"""Losses, pooling and ranks over whole batches without the B x N similarity matrix: `d2s.kernels`.

Sizes in all docstrings and comments: B local batch (rows), N global batch (columns, candidates), K tokens, D width,
E a teacher's width, W workers. In code `n` is the number of rows, B, and `m` that of columns, N. The type "acc" is
the accumulator's: float32, or float64 for float64 inputs.

Always import it as `d2s.kernels`. Transformers looks for another package named `kernels` and, with the
repository's root on the path, executes this file as a top-level module. So nothing is imported here before a
name is asked for, and the top-level module offers no names at all.
"""

_NAMES = (
    "gpo_pool",
    "hinge_loss",
    "implementation",
    "info_nce_loss",
    "pointwise_distillation",
    "relational_distillation",
    "retrieval_ranks",
    "sigmoid_loss",
)
__all__ = list(_NAMES) if __name__ != "kernels" else []


def __getattr__(name: str) -> object:
    if name in __all__:
        from importlib import import_module

        return getattr(import_module("d2s.kernels.functional"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
