"""The committed figures of all builds, `results/compile.json`, and what is wrong with a build."""

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from d2s.common.files import read_json, write_text
from d2s.kernels.build.jobs import Built

PATH = Path(__file__).resolve().parents[1] / "results" / "compile.json"
# Shared memory that a block can have, in KiB, by architecture.
SHARED_KIB = {80: 163, 90: 227, 100: 227}

Committed = dict[str, dict[str, int]]


def read_figures() -> Committed | None:
    """The committed figures by `Job.key`; None if another version of triton made them, as it allocates differently.

    Raises ValueError naming the file if it is damaged.
    """
    import triton

    if not PATH.exists():
        return {}
    try:
        content = read_json(PATH)
        return content["figures"] if content["triton"] == triton.__version__ else None
    except (KeyError, TypeError, ValueError) as error:
        remedy = "restore it with git, or make it anew with `python -m d2s.kernels.compile --write`"
        raise ValueError(f"{PATH}: {str(error).removeprefix(f'{PATH}: ')}; {remedy}") from error


def write_figures(results: Iterable[Built]) -> None:
    """Replaces the committed figures by those of a complete run, one build a line."""
    import triton

    figures = {built.job.key: asdict(built.figures) for built in results if built.figures}
    lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(figures[key])}" for key in sorted(figures))
    version = json.dumps(triton.__version__)
    write_text(PATH, f'{{\n "triton": {version},\n "figures": {{\n{lines}\n }}\n}}\n')


def faults(built: Built, committed: Committed | None, dots: bool) -> list[str]:
    """What is wrong with a build, one message each. dots: the kernel multiplies matrices.

    committed: a build may spill as much as its committed figures, and nothing without any; None allows all spills.
    """
    job, figures = built.job, built.figures
    if figures is None:
        return [f"{job.key}: does not compile: {built.error}"]
    found = []
    limit = 1024 * SHARED_KIB[job.arch]
    if figures.shared > limit:
        found.append(f"{job.key}: needs {figures.shared} bytes of shared memory; sm_{job.arch} has {limit}")
    allowed = (committed or {}).get(job.key, {})
    for name in ("spill_stores", "spill_loads") if committed is not None else ():
        now, before = getattr(figures, name), allowed.get(name, 0)
        if now > before:
            found.append(f"{job.key}: {name} {now} bytes; the committed figure is {before}")
    if dots and job.half and figures.tensor_core == 0:
        found.append(f"{job.key}: multiplies 16-bit matrices without tensor cores")
    return found
