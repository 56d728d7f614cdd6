"""Building the Triton kernels for devices that need not be here, and what is wrong with a build.

Everything is built in worker processes in which TRITON_INTERPRET is not set. Nothing here imports triton before
that, which is why this module imports the kernels inside its functions.
"""

import json
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from d2s.kernels.files import write_whole

if TYPE_CHECKING:
    from d2s.kernels.fused.spec import KernelSpec
    from d2s.kernels.fused.tiles import Tile

FIGURES = Path(__file__).resolve().parents[1] / "results" / "compile.json"
ARCHITECTURES = (80, 90, 100)
# What a block may have, in bytes.
SHARED = {
    80: 163 << 10,
    86: 99 << 10,
    89: 99 << 10,
    90: 227 << 10,
    100: 227 << 10,
    103: 227 << 10,
    120: 99 << 10,
}
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
        """Its name among the committed figures."""
        t = self.tile
        shape = f"{t.rows}x{t.columns}x{t.depth}/w{t.warps}s{t.stages}"
        return f"{self.kernel}/sm_{self.arch}/{self.width}/{self.dtype}/{shape}"


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What the assembler says of one build; spills in bytes of stores and of loads."""

    registers: int
    spill_stores: int
    spill_loads: int
    shared: int
    tensor_core: int
    instructions: int


@dataclass(frozen=True, kw_only=True)
class Built:
    """A finished job: figures, or the reason why there are none."""

    job: Job
    figures: Figures | None
    error: str = ""
    seconds: float = 0.0


def jobs(specs: Sequence["KernelSpec"], architectures: Iterable[int], tuned: dict[str, dict]) -> list[Job]:
    """Every build that differs from the others; tuned: the content of tiles.json."""
    from d2s.kernels.fused.tiles import Tile, default_tile, entry

    by_build: dict[tuple, Job] = {}
    for spec in specs:
        for arch in architectures:
            for dtype in spec.dtypes:
                half = dtype in HALF
                row = spec.row or spec.name
                tiles = [
                    (width, default_tile(row, width, half, divmod(arch, 10)), False) for width in spec.widths
                ]
                for width in spec.widths:
                    found = tuned.get(entry(row, divmod(arch, 10), width, half))
                    if found:
                        tiles.append((width, Tile(**found), True))
                for width, tile, is_tuned in tiles:
                    job = Job(
                        kernel=spec.name, tile=tile, width=width, dtype=dtype, arch=arch, tuned=is_tuned
                    )
                    by_build.setdefault(_identity(spec, job), job)
    return list(by_build.values())


def _identity(spec: "KernelSpec", job: Job) -> tuple:
    """Equal for two jobs that would build the same code."""
    constants = tuple(spec.constants(job.tile, job.width, job.dtype in HALF).items())
    typed = job.dtype if "*x" in {*spec.pointers.values()} else None
    return spec.name, job.arch, typed, tuple(options(spec, job).items()), constants


def options(spec: "KernelSpec", job: Job) -> dict[str, int]:
    """What the kernel is launched with."""
    own = spec.options(job.tile, job.width, job.dtype in HALF) if spec.options else {}
    return {"num_warps": job.tile.warps, "num_stages": job.tile.stages, **own}


def source(spec: "KernelSpec", job: Job) -> object:
    """The kernel with its argument types, constants and alignments, as triton's compiler takes it."""
    from triton.compiler import ASTSource

    constants = dict(spec.constants(job.tile, job.width, job.dtype in HALF))
    types = {**spec.pointers, **spec.scalars}
    names = spec.kernel.arg_names
    unknown = [name for name in names if name not in types and name not in constants]
    surplus = sorted({*types, *constants}.difference(names))
    if unknown or surplus:
        raise ValueError(f"the spec says nothing of {unknown} and speaks of {surplus}, which do not exist")
    signature = {name: types.get(name, "constexpr").replace("*x", f"*{job.dtype}") for name in names}
    aligned = {
        (names.index(name),): [["tt.divisibility", 16]]
        for name, kind in types.items()
        if name not in spec.unaligned and (kind.startswith("*") or kind.startswith("i"))
    }
    return ASTSource(fn=spec.kernel, signature=signature, constexprs=constants, attrs=aligned)


def build(job: Job) -> Built:
    """Compiles one job; in a worker process."""
    from d2s.kernels.build import assembly

    started = time.perf_counter()
    try:
        spec = all_specs()[job.kernel]
        registers, stores, loads, shared, tensor, total = assembly.compile_and_weigh(
            source(spec, job), job.arch, options(spec, job)
        )
    # Whatever the compiler raises is this row's fault and must not hide the other rows.
    except Exception as error:  # noqa: BLE001
        lines = [line for line in str(error).strip().splitlines() if line.strip()] or [""]
        message = f"{type(error).__name__}: {lines[-1].strip()}"
        return Built(job=job, figures=None, error=message, seconds=time.perf_counter() - started)
    figures = Figures(
        registers=registers,
        spill_stores=stores,
        spill_loads=loads,
        shared=shared,
        tensor_core=tensor,
        instructions=total,
    )
    return Built(job=job, figures=figures, seconds=time.perf_counter() - started)


def all_specs() -> dict[str, "KernelSpec"]:
    from d2s.kernels.fused import ALL_SPECS

    return {spec.name: spec for spec in ALL_SPECS}


def build_all(todo: Sequence[Job], processes: int) -> Iterator[Built]:
    """The jobs' results in their order, built side by side in processes of their own."""
    from d2s.kernels.build.workers import Workers

    with Workers(processes) as workers:
        yield from workers.build(todo)


def read_figures() -> dict[str, dict[str, int]] | None:
    """The committed figures by key; None where they were taken with another triton, which allocates otherwise.

    Raises ValueError naming the file and the entry where they are damaged.
    """
    import triton

    if not FIGURES.is_file():
        return {}
    remedy = "restore it with git, or make it anew with `python -m d2s.kernels.compile --write`"
    try:
        content = json.loads(FIGURES.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or not isinstance(content.get("figures"), dict):
            raise ValueError("holds no figures")
        if not isinstance(content.get("triton"), str):
            raise ValueError("names no version of triton")
        for key, figures in content["figures"].items():
            names = [field.name for field in fields(Figures)]
            if not isinstance(figures, dict) or any(type(figures.get(name)) is not int for name in names):
                raise ValueError(f"{key}: must hold the whole numbers {', '.join(names)}")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{FIGURES}: {error}; {remedy}") from error
    return content["figures"] if content["triton"] == triton.__version__ else None


def faults(built: Built, committed: dict[str, dict[str, int]] | None, dots: bool) -> list[str]:
    """What is wrong with a build, in words; dots: it multiplies matrices.

    committed: what a build may spill, nothing where it has no figures; with None spills are no fault.
    """
    job, figures = built.job, built.figures
    if figures is None:
        return [f"{job.key}: does not compile: {built.error}"]
    found = []
    limit = SHARED.get(job.arch)
    if limit is not None and figures.shared > limit:
        found.append(f"{job.key}: needs {figures.shared} bytes of shared memory; sm_{job.arch} has {limit}")
    allowed = (committed or {}).get(job.key, {})
    for name in ("spill_stores", "spill_loads") if committed is not None else ():
        now, before = getattr(figures, name), allowed.get(name, 0)
        if now > before:
            found.append(f"{job.key}: {name} {now} bytes; the committed figure is {before}")
    if dots and job.dtype in HALF and figures.tensor_core == 0:
        found.append(f"{job.key}: multiplies 16-bit matrices without tensor cores")
    return found


def write_figures(results: Iterable[Built]) -> None:
    """Replaces the committed figures by those of a complete run."""
    import triton

    figures = {r.job.key: asdict(r.figures) for r in results if r.figures}
    lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(figures[key])}" for key in sorted(figures))
    FIGURES.parent.mkdir(exist_ok=True)
    version = json.dumps(triton.__version__)
    write_whole(FIGURES, f'{{\n "triton": {version},\n "figures": {{\n{lines}\n }}\n}}\n')
