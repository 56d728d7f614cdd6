"""`python -m d2s.kernels.compile`: builds every Triton kernel for devices that need not be here, and weighs it.

For every kernel, every entry of the tile table (the defaults, and what was tuned) and every architecture one row:
registers, spills, shared memory, tensor-core and all instructions. It fails, naming each fault, where a kernel
does not compile, needs more shared memory than the device has, spills more than the committed figures
(`results/compile.json`, made by `--write`), or multiplies 16-bit matrices without tensor cores.
"""

import argparse
import os
import sys
import time
from typing import TYPE_CHECKING

from d2s.common.command import positive
from d2s.kernels.build.builds import (
    ARCHITECTURES,
    FIGURES,
    SHARED,
    Built,
    Job,
    all_specs,
    build_all,
    faults,
    jobs,
    read_figures,
    write_figures,
)

if TYPE_CHECKING:
    from d2s.kernels.fused.spec import KernelSpec

HEADER = (
    f"{'kernel':28} {'tile':>12} {'w/s':>4} {'D':>5} {'dtype':5} {'arch':>6} {'regs':>4} {'spill st/ld':>11}"
    f" {'shared':>9} {'tensor':>6} {'instr':>6} {'s':>5}"
)


def line(built: Built) -> str:
    """One row of the table."""
    job, f = built.job, built.figures
    tile = f"{job.tile.rows}x{job.tile.columns}x{job.tile.depth}{'*' if job.tuned else ''}"
    start = f"{job.kernel:28} {tile:>12} {job.tile.warps}/{job.tile.stages:<2} {job.width:5} {job.dtype:5}"
    start += f" sm_{job.arch:<3}"
    if f is None:
        return f"{start}  does not compile"
    spills = f"{f.spill_stores}/{f.spill_loads}"
    return (
        f"{start} {f.registers:4} {spills:>11} {f.shared / 1024:5.1f} KiB {f.tensor_core:6}"
        f" {f.instructions:6} {built.seconds:5.1f}"
    )


def _archs(text: str) -> list[int]:
    """80,90 as numbers."""
    known = {str(arch): arch for arch in SHARED}
    if unknown := [part for part in text.split(",") if part not in known]:
        names = ", ".join(repr(part) for part in unknown)
        raise argparse.ArgumentTypeError(f"{names} unknown; known are {', '.join(known)}, e.g. 80,90")
    return [known[part] for part in text.split(",")]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m d2s.kernels.compile", description=__doc__.split("\n")[0])
    default = ",".join(map(str, ARCHITECTURES))
    parser.add_argument("--arch", type=_archs, default=default, help=f"e.g. 80,90; default {default}")
    parser.add_argument("--kernel", action="append", help="these kernels alone")
    parser.add_argument("--width", type=int, action="append", help="these D alone")
    parser.add_argument("--jobs", type=positive, default=min(2, os.cpu_count() or 1), help="processes")
    parser.add_argument("--write", action="store_true", help=f"replace the figures in {FIGURES.name}")
    return parser


def _chosen(arguments: argparse.Namespace, specs: dict[str, "KernelSpec"]) -> list["KernelSpec"]:
    """The kernels to build. Raises ValueError where a name or a width belongs to none of them."""
    wanted = arguments.kernel or list(specs)
    if unknown := [name for name in wanted if name not in specs]:
        raise ValueError(f"no kernel {', '.join(unknown)}; there are {', '.join(specs)}")
    widths = sorted({width for name in wanted for width in specs[name].widths})
    if unknown := [width for width in arguments.width or () if width not in widths]:
        said = ", ".join(map(str, unknown))
        raise ValueError(f"argument --width: no kernel of these is built for D = {said}; there are {widths}")
    # What the table lacks has no figure to be compared with, so a part must not take the place of the whole.
    if arguments.write and (arguments.kernel or arguments.width or {*arguments.arch} != {*ARCHITECTURES}):
        raise ValueError("--write needs all kernels, widths and architectures")
    return [specs[name] for name in wanted]


def main(argv: list[str] | None = None) -> int:
    """Prints a row a build; 0, or 1 where a build is wrong, 2 where the command or a table is."""
    arguments = _parser().parse_args(argv)
    try:
        from d2s.kernels.fused.tiles import tuned_tiles

        specs = all_specs()
        todo = jobs(_chosen(arguments, specs), arguments.arch, tuned_tiles())
        todo = [job for job in todo if not arguments.width or job.width in arguments.width]
        return _report(todo, specs, _committed(arguments.write), arguments)
    except (ImportError, OSError, ValueError) as error:
        print(f"compile: {error}", file=sys.stderr)
        return 2


def _committed(writing: bool) -> dict[str, dict[str, int]] | None:
    """What spills are compared with; says so where they are not."""
    try:
        figures = read_figures()
    except ValueError:
        # What is about to be replaced may be damaged.
        if writing:
            return None
        raise
    if figures is None and not writing:
        print(f"compile: {FIGURES.name} is of another triton: spills are no faults", file=sys.stderr)
    return figures


def _report(
    todo: list[Job],
    specs: dict[str, "KernelSpec"],
    committed: dict[str, dict[str, int]] | None,
    arguments: argparse.Namespace,
) -> int:
    started = time.perf_counter()
    print(HEADER)
    results, wrong = [], []
    for built in build_all(todo, arguments.jobs):
        print(line(built), flush=True)
        results.append(built)
        wrong += faults(built, committed, specs[built.job.kernel].dots)
    if arguments.write and all(r.figures for r in results):
        write_figures(results)
        wrong = [fault for r in results for fault in faults(r, read_figures(), specs[r.job.kernel].dots)]
    for fault in wrong:
        print(f"compile: {fault}", file=sys.stderr)
    spilling = sum(bool(r.figures and r.figures.spill_stores + r.figures.spill_loads) for r in results)
    print(
        f"{len(results)} builds of {len({r.job.kernel for r in results})} kernels, {spilling} spill,"
        f" {len(wrong)} faults, {time.perf_counter() - started:.0f} s"
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
