"""What importing the kernels brings along, and that nobody takes this folder for another package."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

TOWERS = """
import sys
from transformers import BertConfig, BertModel, SwinConfig, SwinModel, ViTConfig, ViTModel
small = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
BertModel(BertConfig(vocab_size=20, **small))
ViTModel(ViTConfig(image_size=16, patch_size=8, **small))
SwinModel(SwinConfig(image_size=16, patch_size=4, window_size=2, embed_dim=8, depths=[1], num_heads=[2]))
from transformers.utils import import_utils
import d2s.kernels
print("built", "d2s.kernels" in sys.modules, d2s.kernels.hinge_loss.__module__)
"""


def run(*arguments, cwd=ROOT):
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "D2S_KERNELS")}
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def installed(elsewhere):
    """Whether d2s is found from everywhere; `make gpu` installs nothing."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return not subprocess.run(
        [sys.executable, "-c", "import d2s"], cwd=elsewhere, env=environment, capture_output=True
    ).returncode


def test_import_brings_torch_and_nothing_else():
    code = (
        "import sys, d2s.kernels; light = 'torch' in sys.modules; d2s.kernels.hinge_loss;"
        "print(light, sorted(m for m in sys.modules if m in "
        "('transformers', 'deepspeed', 'pyarrow', 'webdataset', 'd2s.shards')))"
    )
    assert run("-c", code) == "False []"


@pytest.mark.slow
@pytest.mark.skipif(find_spec("transformers") is None, reason="transformers is not installed")
@pytest.mark.parametrize("how", ["from the root", "as a script", "as a script in the package"])
def test_transformers_builds_its_models_beside_this_folder(how, tmp_path):
    if how == "from the root":
        out = run("-c", TOWERS)
    elif how == "as a script in the package" and not installed(tmp_path):
        pytest.skip("d2s is not installed, and the root is not on the path")
    else:
        # The root, or `d2s/` as with `deepspeed d2s/train.py`, is then first on the path.
        first = ROOT if how == "as a script" else ROOT / "d2s"
        script = tmp_path / "script.py"
        script.write_text(f"import sys; sys.path[0] = {str(first)!r}\n{TOWERS}", encoding="utf-8")
        out = run(script)
    assert out == "built True d2s.kernels.functional"


def test_top_level_execution_offers_nothing_that_could_be_mistaken():
    code = "import kernels; print(kernels.__all__, hasattr(kernels, '__version__'), dir(kernels)[:0])"
    assert run("-c", code) == "[] False []"


WITHOUT_NUMPY = """
import importlib.machinery as machinery
found = machinery.PathFinder.find_spec
machinery.PathFinder.find_spec = lambda name, *rest: None if name.split(".")[0] == "numpy" else found(name, *rest)
import torch
from d2s import kernels
g = torch.Generator().manual_seed(0)
image, text = (torch.randn(40, 8, generator=g).requires_grad_() for _ in range(2))
loss = kernels.hinge_loss(image, text, torch.arange(40), hardest=True)
mask = torch.ones(3, 5, dtype=torch.bool)
pooled = kernels.gpo_pool(torch.randn(3, 5, 4, generator=g, requires_grad=True), torch.rand(3, 5), mask)
(loss + pooled.sum()).backward()
import sys
print(torch.isfinite(image.grad).all().item(), "numpy" in sys.modules)
"""


@pytest.mark.filterwarnings("ignore")
def test_numpy_is_no_requirement():
    assert run("-W", "ignore", "-c", WITHOUT_NUMPY).splitlines()[-1] == "True False"
