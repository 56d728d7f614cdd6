"""Set before anything imports triton, transformers or tokenizers; none of them looks again later."""

import os

# With D2S_TEST_DEVICE=cuda the kernels run on the device instead of in the interpreter. All else is about processes
# on a CPU: several workers on one GPU would refuse to start.
if os.environ.get("D2S_TEST_DEVICE", "cpu") == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# A cluster's or launcher's variables would make single-process tests believe that they are a rank.
for _name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
    os.environ.pop(_name, None)

try:
    from hypothesis import settings
except ImportError:
    # A GPU machine with torch, triton and pytest alone runs tests/kernels, which does without.
    settings = None

if settings is not None:
    # Deadlines of milliseconds measure the machine's load, not the code.
    settings.register_profile("d2s", deadline=None)
    settings.load_profile("d2s")


def pytest_collection_modifyitems(items: list) -> None:
    """The cluster's tests first: they wait most, and what waits should not be what is left at the end."""
    items.sort(key=lambda item: "launchers" not in item.path.parts)
