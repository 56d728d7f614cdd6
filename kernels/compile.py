"""`python -m d2s.kernels.compile`: compiles every Triton kernel for GPUs that need not be here.

Prints a row for every kernel, architecture, width, type and tile (the default, and a tuned one marked *): registers,
spills, shared memory and tensor-core instructions. Fails, naming each fault, if a kernel does not compile,
needs more shared memory than the GPU has, spills more than its committed figures (`results/compile.json`, written
by `--write`), or multiplies 16-bit matrices without tensor cores.
"""

import argparse
import os
import sys
import time

from d2s.common.command import Parser, positive, run
from d2s.kernels.build.figures import PATH, faults, read_figures, write_figures
from d2s.kernels.build.jobs import Built, all_jobs, build_all

HEADER = f"{'build':61} {'regs':>4} {'spill st/ld':>11} {'shared':>9} {'tensor':>6}"


def line(built: Built) -> str:
    """One row of the table; * marks a tuned tile."""
    start, f = f"{built.job.key}{' *' if built.job.tuned else ''}", built.figures
    if f is None:
        return f"{start:61} does not compile"
    spills = f"{f.spill_stores}/{f.spill_loads}"
    return f"{start:61} {f.registers:4} {spills:>11} {f.shared / 1024:5.1f} KiB {f.tensor_core:6}"


def _compile(arguments: argparse.Namespace) -> list[str]:
    """Builds, prints a row for each build and returns the faults."""
    try:
        from d2s.kernels.fused import ALL_SPECS
    except ImportError as error:
        raise ValueError(f"{error}; install triton") from error
    from d2s.kernels.fused.tiles import tuned_tiles

    specs = {spec.name: spec for spec in ALL_SPECS}
    wanted = arguments.kernel or list(specs)
    if unknown := [name for name in wanted if name not in specs]:
        raise ValueError(f"no kernel {', '.join(unknown)}; there are {', '.join(specs)}")
    # A kernel without committed figures is not compared, so the file must hold all of them.
    if arguments.write and arguments.kernel:
        raise ValueError("--write needs all kernels")
    jobs = all_jobs([specs[name] for name in wanted], tuned_tiles())
    # Figures that are about to be replaced may be damaged.
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
    """Returns 0, 1 if a build has a fault, 2 if the command or a table is wrong, 130 if interrupted."""
    parser = Parser(prog="python -m d2s.kernels.compile", description=__doc__.split("\n")[0])
    parser.add_argument("--kernel", action="append", help="only this kernel; may be repeated")
    parser.add_argument("--jobs", type=positive, default=min(2, os.cpu_count() or 1), help="processes")
    parser.add_argument("--write", action="store_true", help=f"replace the figures in {PATH.name}")
    arguments, found = parser.parse_args(argv), []
    return run(lambda: found.extend(_compile(arguments))) or int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
