"""`d2s.kernels`: losses, pooling and retrieval ranks that never store the B x N similarity matrix.

Docstrings and comments name sizes by letters: B is the local batch (rows), N the global batch (columns, or
candidates), K the tokens of a sample, D the width of the embeddings, E the width of a teacher, W the workers.
In code `n` is the number of rows (B) and `m` the number of columns (N). "acc" is the accumulator type:
float64 for float64 inputs, else float32.

Always import this package as `d2s.kernels`. Transformers looks for another package, named `kernels`. If the
root of this repository is on the path, Transformers finds this file instead and runs it. So this file imports
nothing until a name is requested, and offers no names when it runs as `kernels`.
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
