"""`python -m d2s.kernels.compile`: compiles every Triton kernel for all supported GPUs, on a machine without them.

Prints a row for every kernel, architecture, width, type and tile. The row shows registers, spills (bytes that move
between registers and memory), shared memory and tensor-core instructions. A * marks a tuned tile.

Prints a message for each fault and then fails. It is a fault if a kernel does not compile, needs more shared memory
than the GPU has, multiplies 16-bit matrices without tensor cores, or spills more bytes than the committed figures
allow. The committed figures are in `results/compile.json`. The option `--write` replaces this file.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from d2s.common.command import Parser, positive, run
from d2s.common.files import read_json, write_text
from d2s.kernels.builds import Built, all_jobs, build_all

# The file with the committed figures of all compiled kernels.
PATH = Path(__file__).resolve().parent / "results" / "compile.json"
# Maps an architecture to the most shared memory that a thread block can have, in KiB.
SHARED_KIB = {80: 163, 90: 227, 100: 227}

Committed = dict[str, dict[str, int]]
HEADER = f"{'build':61} {'regs':>4} {'spill st/ld':>11} {'shared':>9} {'tensor':>6}"


def read_figures() -> Committed | None:
    """Returns the committed figures by `Job.key`. Returns {} if there is no file.

    Returns None if the figures were made with another version of triton, because versions allocate registers
    differently. Raises ValueError, with the file's name, if the file is damaged.
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
    """Replaces the committed figures with the figures in `results`. The file gets one line for each build."""
    import triton

    figures = {built.job.key: asdict(built.figures) for built in results if built.figures}
    lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(figures[key])}" for key in sorted(figures))
    version = json.dumps(triton.__version__)
    write_text(PATH, f'{{\n "triton": {version},\n "figures": {{\n{lines}\n }}\n}}\n')


def faults(built: Built, committed: Committed | None, dots: bool) -> list[str]:
    """Returns a message for each fault of a build.

    committed: maps `Job.key` to figures with the most bytes that the build may spill. A build without an entry may
        not spill. If `committed` is None, all spills are allowed.
    dots: whether the kernel multiplies matrices.
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


def line(built: Built) -> str:
    """Returns the row of the table for one build. A * marks a tuned tile."""
    start, f = f"{built.job.key}{' *' if built.job.tuned else ''}", built.figures
    if f is None:
        return f"{start:61} does not compile"
    spills = f"{f.spill_stores}/{f.spill_loads}"
    return f"{start:61} {f.registers:4} {spills:>11} {f.shared / 1024:5.1f} KiB {f.tensor_core:6}"


def _compile(arguments: argparse.Namespace) -> list[str]:
    """Compiles the kernels and prints a row for each build. Prints and returns the messages of all faults."""
    try:
        from d2s.kernels.fused import ALL_SPECS
    except ImportError as error:
        raise ValueError(f"{error}; install triton") from error
    from d2s.kernels.fused.tiles import tuned_tiles

    specs = {spec.name: spec for spec in ALL_SPECS}
    wanted = arguments.kernel or list(specs)
    if unknown := [name for name in wanted if name not in specs]:
        raise ValueError(f"no kernel {', '.join(unknown)}; there are {', '.join(specs)}")
    # --write replaces the whole file. With only some kernels, the figures of all others would be lost.
    if arguments.write and arguments.kernel:
        raise ValueError("--write needs all kernels")
    jobs = all_jobs([specs[name] for name in wanted], tuned_tiles())
    # With --write the old figures are not read, because --write is also the remedy for a damaged file.
    committed = None if arguments.write else read_figures()
    if committed is None and not arguments.write:
        print(f"compile: {PATH.name} is of another triton: spills are no faults", file=sys.stderr)
    started, results = time.perf_counter(), []
    print(HEADER)
    for built in build_all(jobs, arguments.jobs):
        print(line(built), flush=True)
        results.append(built)
    if arguments.write and all(built.figures for built in results):
        write_figures(results)
    found = [fault for built in results for fault in faults(built, committed, specs[built.job.kernel].dots)]
    for fault in found:
        print(f"compile: {fault}", file=sys.stderr)
    spilling = sum(bool(b.figures and b.figures.spill_stores + b.figures.spill_loads) for b in results)
    print(
        f"{len(results)} builds of {len({b.job.kernel for b in results})} kernels, {spilling} spill,"
        f" {len(found)} faults, {time.perf_counter() - started:.0f} s"
    )
    return found


def main(argv: list[str] | None = None) -> int:
    """Runs the command. Returns 0, or 1 if a build has a fault, 2 for a user's mistake, 130 if interrupted."""
    parser = Parser(prog="python -m d2s.kernels.compile", description=__doc__.split("\n")[0])
    parser.add_argument("--kernel", action="append", help="only this kernel; may be repeated")
    parser.add_argument("--jobs", type=positive, default=min(2, os.cpu_count() or 1), help="processes")
    parser.add_argument("--write", action="store_true", help=f"replace the figures in {PATH.name}")
    arguments, found = parser.parse_args(argv), []
    return run(lambda: found.extend(_compile(arguments))) or int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
