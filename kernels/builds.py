"""Compiles each kernel for every tile, width, type and GPU architecture with which it can be launched.

Kernels are compiled in worker processes in which TRITON_INTERPRET is not set. Triton reads this variable when it
is first imported. So this module imports triton and the kernels inside its functions.
"""

import contextlib
import io
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import product
from multiprocessing import get_context
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from d2s.kernels.fused.spec import KernelSpec
    from d2s.kernels.fused.tiles import Tile

ARCHITECTURES = (80, 90, 100)
HALF = ("bf16", "fp16")
# Matches the tensor-core instructions in PTX code. Each generation of GPUs has its own instruction.
TENSOR_CORE = re.compile(r"^\s*(?:@%?!?\w+\s+)?(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b", re.MULTILINE)
REGISTERS = re.compile(r"Used (\d+) registers")
SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")


@dataclass(frozen=True, kw_only=True)
class Job:
    """A kernel to compile for one tile, one width D and one type of the embeddings, and one architecture."""

    kernel: str
    tile: "Tile"
    width: int
    dtype: str
    arch: int  # as in 90 for sm_90
    tuned: bool = False  # whether `tile` differs from the default tile

    @property
    def key(self) -> str:
        """The key of this job in `results/compile.json`."""
        return f"{self.kernel}/sm_{self.arch}/{self.width}/{self.dtype}/{self.tile}"

    @property
    def half(self) -> bool:
        """Whether the embeddings are of a 16-bit type."""
        return self.dtype in HALF


@dataclass(frozen=True, kw_only=True)
class Figures:
    """The figures of a compiled kernel."""

    registers: int  # number of registers per thread
    spill_stores: int  # bytes that a thread writes to memory because it has too few registers
    spill_loads: int  # bytes that a thread reads back from this memory
    shared: int  # bytes of shared memory per thread block
    tensor_core: int  # number of tensor-core instructions


@dataclass(frozen=True, kw_only=True)
class Built:
    """The result of a job: `figures` or, if the kernel does not compile, the message `error`."""

    job: Job
    figures: Figures | None = None
    error: str = ""


def all_jobs(specs: Iterable["KernelSpec"], tuned: dict[str, "Tile"]) -> list[Job]:
    """Returns the jobs for default and `tuned` tiles. If several jobs compile to equal code, returns the first."""
    from d2s.kernels.fused.tiles import default_tile, entry

    by_build: dict[tuple, Job] = {}
    for spec, arch in product(specs, ARCHITECTURES):
        for dtype, width in product(spec.dtypes, spec.widths):
            half, capability = dtype in HALF, divmod(arch, 10)
            default = default_tile(spec.tile_name, width, half, capability)
            for tile in (default, tuned.get(entry(spec.tile_name, capability, width, half), default)):
                job = Job(
                    kernel=spec.name, tile=tile, width=width, dtype=dtype, arch=arch, tuned=tile != default
                )
                typed = dtype if "*x" in spec.types.values() else None
                by_build.setdefault((arch, typed, *spec.build_key(tile, width, half)), job)
    return list(by_build.values())


def source(spec: "KernelSpec", job: Job) -> object:
    """Returns triton's ASTSource for a job. It holds the kernel with its argument types, constants and alignments.

    Raises ValueError if `spec` and the kernel do not have the same arguments.
    """
    from triton.compiler import ASTSource

    constants = dict(spec.constants(job.tile, job.width, job.half))
    names, sizes = spec.kernel.arg_names, dict.fromkeys(spec.kernel.do_not_specialize, "i32")
    types = spec.types | sizes
    missing = [name for name in names if name not in types and name not in constants]
    surplus = sorted({*types, *constants}.difference(names))
    if missing or surplus:
        raise ValueError(f"{spec.name}: the spec lacks the arguments {missing}; the kernel lacks {surplus}")
    signature = {name: types.get(name, "constexpr").replace("*x", f"*{job.dtype}") for name in names}
    aligned = {
        (names.index(name),): [["tt.divisibility", 16]]
        for name, kind in types.items()
        if name not in spec.unaligned and name not in sizes and kind != "fp32"
    }
    return ASTSource(fn=spec.kernel, signature=signature, constexprs=constants, attrs=aligned)


def compile_kernel(source: object, arch: int, options: dict[str, int]) -> Figures:
    """Compiles triton's ASTSource `source` and returns its figures. TRITON_INTERPRET must not be set.

    options: result of `KernelSpec.launch_options`. Triton's cache is not used, because it does not keep the report of
    the assembler. Raises ValueError if the report lacks registers or spills, and any exception of the compiler.
    """
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget

    log = io.StringIO()
    with knobs.compilation.scope(), knobs.nvidia.scope(), contextlib.redirect_stdout(log):
        knobs.compilation.always_compile = True
        knobs.nvidia.dump_ptxas_log = True
        compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    report = log.getvalue()
    registers, spills = REGISTERS.search(report), SPILLS.search(report)
    if registers is None or spills is None:
        raise ValueError(f"the assembler reported neither registers nor spills: {report[:200]!r}")
    return Figures(
        registers=int(registers[1]),
        spill_stores=int(spills[1]),
        spill_loads=int(spills[2]),
        shared=int(compiled.metadata.shared),
        tensor_core=len(TENSOR_CORE.findall(compiled.asm["ptx"])),
    )


def build(job: Job) -> Built:
    """Compiles one job and returns its result. TRITON_INTERPRET must not be set in this process."""
    from d2s.kernels.fused import ALL_SPECS

    try:
        spec = next(spec for spec in ALL_SPECS if spec.name == job.kernel)
        options = spec.launch_options(job.tile, job.width, job.half)
        return Built(job=job, figures=compile_kernel(source(spec, job), job.arch, options))
    # The compiler can raise any exception. It must not keep the other kernels from being compiled.
    except Exception as error:  # noqa: BLE001
        lines = str(error).strip().splitlines() or [""]
        return Built(job=job, error=f"{type(error).__name__}: {lines[-1].strip()}")


def build_all(jobs: Sequence[Job], processes: int) -> Iterator[Built]:
    """Compiles jobs in `processes` processes. Yields results in order. Raises ValueError if the compiler crashes."""
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
