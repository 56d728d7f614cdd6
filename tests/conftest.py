"""Set before anything imports triton, transformers or tokenizers; none of them looks again later."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# A cluster's or launcher's variables would make single-process tests believe that they are a rank.
for _name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
    os.environ.pop(_name, None)

from hypothesis import settings  # noqa: E402

# Deadlines of milliseconds measure the machine's load, not the code.
settings.register_profile("d2s", deadline=None)
settings.load_profile("d2s")
