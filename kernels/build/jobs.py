"""What to build: each kernel with each of its tiles, widths, types and architectures.

Building happens in worker processes without TRITON_INTERPRET, which triton reads when it is first imported. So this
module imports triton and the kernels inside its functions.
"""

import os
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import product
from multiprocessing import get_context
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from d2s.kernels.build.assembly import Figures
    from d2s.kernels.fused.spec import KernelSpec
    from d2s.kernels.fused.tiles import Tile

ARCHITECTURES = (80, 90, 100)
HALF = ("bf16", "fp16")


@dataclass(frozen=True, kw_only=True)
class Job:
    """One kernel to build: with a tile, for a width D, a type of the embeddings and an architecture."""

    kernel: str
    tile: "Tile"
    width: int
    dtype: str
    arch: int
    tuned: bool = False

    @property
    def key(self) -> str:
        """Its name in `results/compile.json`."""
        return f"{self.kernel}/sm_{self.arch}/{self.width}/{self.dtype}/{self.tile}"

    @property
    def half(self) -> bool:
        """Whether the embeddings have 16 bits."""
        return self.dtype in HALF


@dataclass(frozen=True, kw_only=True)
class Built:
    """A finished job: its figures, or an error."""

    job: Job
    figures: "Figures | None"
    error: str = ""
    seconds: float = 0.0


def all_specs() -> dict[str, "KernelSpec"]:
    """The specs of all kernels by name."""
    from d2s.kernels.fused import ALL_SPECS

    return {spec.name: spec for spec in ALL_SPECS}


def all_jobs(
    specs: Sequence["KernelSpec"], architectures: Iterable[int], tuned: dict[str, "Tile"]
) -> list[Job]:
    """Every kernel with its default tiles and those in the table `tuned`; once, if several build the same code."""
    from d2s.kernels.fused.tiles import default_tile, entry

    by_build: dict[tuple, Job] = {}
    for spec, arch in product(specs, architectures):
        for dtype, width in product(spec.dtypes, spec.widths):
            half, capability = dtype in HALF, divmod(arch, 10)
            default = default_tile(spec.tile_name, width, half, capability)
            for tile in (default, tuned.get(entry(spec.tile_name, capability, width, half), default)):
                job = Job(
                    kernel=spec.name, tile=tile, width=width, dtype=dtype, arch=arch, tuned=tile != default
                )
                constants = spec.constants(tile, width, half)
                options = spec.launch_options(tile, width, half)
                typed = dtype if "*x" in spec.pointers.values() else None
                build = spec.name, arch, typed, *options.items(), *constants.items()
                by_build.setdefault(build, job)
    return list(by_build.values())


def source(spec: "KernelSpec", job: Job) -> object:
    """The kernel with its argument types, constants and alignments, as triton's compiler takes it.

    Raises ValueError if the spec lacks an argument of the kernel or has one that the kernel lacks.
    """
    from triton.compiler import ASTSource

    constants = dict(spec.constants(job.tile, job.width, job.half))
    types = {**spec.pointers, **spec.scalars}
    names = spec.kernel.arg_names
    missing = [name for name in names if name not in types and name not in constants]
    surplus = sorted({*types, *constants}.difference(names))
    if missing or surplus:
        raise ValueError(f"{spec.name}: the spec lacks the arguments {missing}; the kernel lacks {surplus}")
    signature = {name: types.get(name, "constexpr").replace("*x", f"*{job.dtype}") for name in names}
    aligned = {
        (names.index(name),): [["tt.divisibility", 16]]
        for name, kind in types.items()
        if name not in spec.unaligned and (kind.startswith("*") or kind.startswith("i"))
    }
    return ASTSource(fn=spec.kernel, signature=signature, constexprs=constants, attrs=aligned)


def build(job: Job) -> Built:
    """Compiles one job; call it in a worker process."""
    from d2s.kernels.build.assembly import compile_kernel

    started, figures, message = time.perf_counter(), None, ""
    try:
        spec = all_specs()[job.kernel]
        options = spec.launch_options(job.tile, job.width, job.half)
        figures = compile_kernel(source(spec, job), job.arch, options)
    # The compiler can raise anything; one failing kernel must not hide the results of the others.
    except Exception as error:  # noqa: BLE001
        lines = [line for line in str(error).strip().splitlines() if line.strip()] or [""]
        message = f"{type(error).__name__}: {lines[-1].strip()}"
    return Built(job=job, figures=figures, error=message, seconds=time.perf_counter() - started)


def build_all(jobs: Sequence[Job], processes: int) -> Iterator[Built]:
    """Yields the results in the order of the jobs, each as soon as it is there.

    Raises ValueError if the compiler crashes.
    """
    done = 0
    with ProcessPoolExecutor(processes, get_context("spawn"), _unset_interpreter) as pool:
        try:
            for built in pool.map(build, jobs):
                yield built
                done += 1
        except BrokenProcessPool as error:
            near = ", ".join(job.key for job in jobs[done : done + processes])
            raise ValueError(f"the compiler crashed while it built one of {near}") from error


def _unset_interpreter() -> None:
    os.environ.pop("TRITON_INTERPRET", None)
