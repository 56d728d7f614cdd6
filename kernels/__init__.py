"""`d2s.kernels`: losses, pooling and retrieval ranks that never store the B x N similarity matrix.

Docstrings and comments use a letter for each size. B is the size of the local batch (the rows of the matrix).
N is the size of the global batch (the columns of the matrix, or the candidates). K is the number of tokens of a
sample. D is the width of the embeddings. E is the width of a teacher's embeddings. W is the number of workers.
In code `n` is the number of rows (B) and `m` is the number of columns (N). "acc" is the type in which sums are
accumulated: float64 for float64 inputs, else float32.

Always import this package as `d2s.kernels`. Transformers looks for another package, named `kernels`. If the
root of this repository is on the path, Transformers finds this file instead and runs it. So this file imports
nothing until a name is requested. It offers no names when it runs as `kernels`.
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
