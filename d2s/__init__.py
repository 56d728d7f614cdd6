"""Trains image-text embeddings by dense-to-sparse feature distillation (D2S).

The names in `__all__` are imported on first use. So `import d2s.shards` does not import torch, and
`import d2s.kernels` imports only torch and triton.
"""

from importlib import import_module
from pathlib import Path

_LAZY = {
    "D2SModel": "d2s.model",
    "ModelConfig": "d2s.model",
    "TrainConfig": "d2s.training.config",
    "recall_report": "d2s.evaluate.metrics",
}
__all__ = list(_LAZY)

# In a checkout, packages such as `kernels` lie beside this folder and not in it. Because the parent folder is
# on the path, d2s.kernels can be imported without an install, or if the checkout hides an installed d2s.
_ROOT = Path(__file__).resolve().parent.parent
if (_ROOT / "setup.py").is_file() and (_ROOT / "kernels").is_dir():
    __path__.append(str(_ROOT))


def __getattr__(name: str) -> object:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'd2s' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
