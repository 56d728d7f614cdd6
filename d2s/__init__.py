"""D2S: image-text embeddings trained by dense-to-sparse feature distillation.

The names below are imported on first use. So `import d2s.shards` does not import torch, and `import d2s.kernels`
imports only torch and triton.
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

# In a checkout, `kernels` and the other packages lie beside this folder, not in it. Python finds them through
# this path, also if it starts at the checkout's root and ignores an installed d2s, or if d2s is not installed.
_ROOT = Path(__file__).resolve().parent.parent
if (_ROOT / "setup.py").is_file() and (_ROOT / "kernels").is_dir():
    __path__.append(str(_ROOT))


def __getattr__(name: str) -> object:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'd2s' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
