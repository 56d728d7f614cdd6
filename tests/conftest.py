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


# The files that take longest, in the order in which two workers share them best: what waits beside what computes,
# and nothing long is left for the end, when the other worker has nothing to do.
LONGEST = (
    *("test_sbatch.py", "test_zero_stages.py", "test_preemption.py", "test_submit.py", "test_watchdog.py"),
    *("test_train.py", "test_drill_command.py", "test_compile.py", "test_large_batch.py", "test_readme.py"),
    *("test_fused_contrastive.py", "test_bench.py", "test_workers_agree.py", "test_ablate.py"),
)


def pytest_collection_modifyitems(items: list) -> None:
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(LONGEST)))
