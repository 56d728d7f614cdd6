"""`python -m d2s.kernels.tune`: times candidate tiles on this machine's GPU and writes the table `fused/tiles.json`.

Tunes one kernel at a time, for each width D, and for 16-bit and float32 embeddings. Candidates are the default
tiles of all architectures, and variations of this GPU's default tile: one field is halved or doubled or, for
`stages`, changed by one. A candidate is chosen if it makes the ops that launch the kernel faster by more than NOISE,
and if results are equal up to rounding. The table is written after each kernel, so an interrupted run loses little.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor

from d2s.common.command import Parser, positive, run, user_path
from d2s.common.files import write_json
from d2s.kernels import gpo_pool, implementation
from d2s.kernels.fused import ALL_SPECS
from d2s.kernels.fused.spec import KernelSpec
from d2s.kernels.fused.tiles import LARGE, TABLE, Tile, default_tile, entry, tuned_tiles
from d2s.kernels.problems import PROBLEMS, Shape, one_line

# Maps a kernel to the ops that launch it. The kernel hinge_few is not tuned, because only small batches use it.
OPS = {
    "hinge_max_sweep": ("hinge_max",),
    "hinge_gather": ("hinge_max",),
    "hinge_sum_pairs": ("hinge_sum",),
    "info_nce_sweep": ("info_nce",),
    "info_nce_pairs": ("info_nce",),
    "sigmoid_pairs": ("sigmoid",),
    "positives": ("hinge_sum", "info_nce"),
    "products": ("hinge_sum", "info_nce", "sigmoid"),
    "relational_statistics": ("relational",),
    "gpo_forward": ("gpo",),
    "ranks_count": ("ranks",),
}
# `positives` computes similarities of positives, the other two kernels similarities of negatives. All must round
# alike, so that a negative that equals its positive has the same similarity. So depth, rows and warps are not tuned.
# The depth sets the order of sums. Rows and warps determine which matrix instruction Triton uses.
SAME_SUMS = ("positives", "info_nce_pairs", "hinge_sum_pairs")
# Values of D to tune for. The most important values come first, because a run may be stopped early.
WIDTHS = (512, 256, 1152, 128, 64)
# GPO is tuned by number of tokens, not by D. Maps a value of WIDTHS to the number of tokens to use instead.
TOKENS = {64: 50, 1152: 577}
BOUNDS = {"rows": (16, 1024), "columns": (16, 256), "depth": (16, 512), "warps": (1, 16), "stages": (1, 5)}
NOISE = 0.02
# Number of rows for timing, by whether embeddings have 16 bits. With so many, the GPU limits the speed, not the host.
ROWS = {True: 32768, False: 8192}
# Number of rows for comparing results. It is not a multiple of any tile's size.
CHECKED_ROWS = 1100
# Largest allowed relative difference (in norm) from the results with default tiles. Rounding errors are smaller.
TOLERANCE = 0.1


@dataclass(frozen=True, kw_only=True)
class Task:
    """A kernel to tune for one width and one size of the embeddings' type."""

    spec: KernelSpec
    width: int  # D or, for GPO, the number of tokens
    half: bool  # whether embeddings have 16 bits
    capability: tuple[int, int]  # compute capability of the GPU, as in (9, 0)

    def __str__(self) -> str:
        return f"{self.spec.name} D={self.width} {'half' if self.half else 'float'}"

    @property
    def entry(self) -> str:
        """The key in the tile table."""
        return entry(self.spec.name, self.capability, self.width, self.half)

    @property
    def default(self) -> Tile:
        """The tile that is used if the table has no entry."""
        return default_tile(self.spec.name, self.width, self.half, self.capability)

    def candidates(self) -> list[Tile]:
        """Returns the tiles to try, first the default. If tiles compile to the same code, only one is returned."""
        fields, found = tuple(BOUNDS), [self.default]
        if self.spec.name in SAME_SUMS:
            fields = ("columns", "stages")
        else:
            found += [default_tile(self.spec.name, self.width, self.half, other) for other in LARGE]
        for field in fields:
            value, (least, most) = getattr(self.default, field), BOUNDS[field]
            steps = (value - 1, value + 1) if field == "stages" else (value // 2, value * 2)
            found += [replace(self.default, **{field: step}) for step in steps if least <= step <= most]
        by_build: dict[tuple, Tile] = {}
        for tile in found:
            by_build.setdefault(self.spec.build_key(tile, self.width, self.half), tile)
        return list(by_build.values())


def tasks(kernels: Sequence[str], widths: Sequence[int], capability: tuple[int, int]) -> list[Task]:
    """Returns the tasks for the given kernels and widths, for 16-bit and float32 types, in the order of tuning."""
    specs = {spec.name: spec for spec in ALL_SPECS}
    sizes = {name: TOKENS if name == "gpo_forward" else {} for name in kernels}
    return [
        Task(spec=specs[name], width=sizes[name].get(width, width), half=half, capability=capability)
        for width, half, name in product(widths, (True, False), kernels)
    ]


def make_step(op: str, width: int, dtype: torch.dtype, device: str, rows: int) -> Callable[[], list[Tensor]]:
    """Returns a function that runs an op forward and backward. It returns the result and then the gradients.

    For GPO the weights are inputs. The GRU that computes them is left out, because it is slower than the kernels.
    """
    make, ours = PROBLEMS[op].make, PROBLEMS[op].ours
    if op != "gpo":
        inputs = make(Shape(n=rows, width=width), dtype, device, 0)
        return lambda: [value := ours(inputs), *inputs.gradients(value)]
    inputs = make(Shape(n=max(rows // 512, 3), tokens=width, width=512), dtype, device, 0)
    features, mask = inputs["features"], inputs["mask"]
    weights = torch.full(mask.shape, 1 / width, dtype=dtype, device=device, requires_grad=True)
    inputs.leaves = [features, weights]
    return lambda: [value := gpo_pool(features, weights, mask), *inputs.gradients(value)]


class Trial:
    """Times and checks the ops that launch the kernel of `task`. Each call uses the current tiles of the table."""

    def __init__(self, task: Task, device: str = "cuda") -> None:
        ops, dtypes = OPS[task.spec.name], [torch.bfloat16, torch.float16] if task.half else [torch.float32]
        self.timed = [make_step(op, task.width, dtypes[0], device, ROWS[task.half]) for op in ops]
        self.checked = [
            make_step(op, task.width, kind, device, CHECKED_ROWS) for op in ops for kind in dtypes
        ]
        with patch.dict(tuned_tiles(), clear=True):
            self.expected = self.results()

    def results(self) -> list[Tensor]:
        """Returns the results and gradients of all ops for CHECKED_ROWS rows, as float64 tensors on the CPU."""
        return [x.detach().double().cpu() for step in self.checked for x in step()]

    def check_results(self) -> None:
        """Raises ValueError if results differ by more than TOLERANCE from the results with default tiles."""
        for ours, expected in zip(self.results(), self.expected, strict=True):
            # The condition has a `not`, so that NaN is an error, too.
            if not (ours - expected).norm() <= TOLERANCE * expected.norm():
                raise ValueError("its results differ from those with the default tiles")

    def milliseconds(self) -> float:
        """Returns the median time of forward and backward in milliseconds, summed over the ops."""
        from triton.testing import do_bench

        return sum(do_bench(step, return_mode="median") for step in self.timed)


def tune(task: Task) -> None:
    """Finds the fastest tile for one task. Puts the tile into the table unless it is the default tile."""
    table = tuned_tiles()
    start = table.get(task.entry, task.default)
    times: dict[Tile, float] = {}
    trial = None
    for tile in dict.fromkeys([start, *task.candidates()]):
        table[task.entry] = tile
        failure = ""
        try:
            trial = trial or Trial(task)
            spent = trial.milliseconds()
            if spent < (1 - NOISE) * min(times.values(), default=math.inf):
                trial.check_results()
                times[tile] = spent
        # A launch can raise any exception. The tile is then left out.
        except Exception as error:  # noqa: BLE001
            failure = one_line(error)
        if failure:
            print(f"  {task}: {tile} is left out: {failure}", flush=True)
            # Not inside the handler, where the exception keeps tensors alive. Raises if the GPU is no longer usable.
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
    best = min(times, key=times.get, default=start)
    table.pop(task.entry)
    if best != task.default:
        table[task.entry] = best
    print(f"{task}: {' -> '.join(f'{tile} {ms:.3f} ms' for tile, ms in times.items())}", flush=True)


def tune_all(todo: list[Task], minutes: float, out: Path) -> None:
    """Runs the tasks in order and writes the table to `out` after each. Starts no task after `minutes` minutes."""
    begun, written = time.monotonic(), 0
    try:
        for task in todo:
            passed = (time.monotonic() - begun) / 60
            print(f"tune: {written} of {len(todo)} after {passed:.1f} min", file=sys.stderr, flush=True)
            if passed > minutes:
                break
            tune(task)
            write_json(out, {key: asdict(tile) for key, tile in tuned_tiles().items()})
            written += 1
    finally:
        print(f"written: {written} of {len(todo)} kernels and widths, {out}; the others keep their tiles")


def _tune(arguments: argparse.Namespace) -> None:
    on_gpu = torch.cuda.is_available()
    if not (on_gpu or arguments.dry_run):
        raise ValueError("no CUDA device here; --dry-run lists what would be measured")
    capability = torch.cuda.get_device_capability() if on_gpu else (8, 0)
    todo = tasks(arguments.kernel or tuple(OPS), arguments.width or WIDTHS, capability)
    if arguments.dry_run:
        for task in todo:
            print(f"{task}: {', '.join(map(str, task.candidates()))}")
        print(f"{sum(len(task.candidates()) for task in todo)} candidates")
        return
    if (used := implementation("cuda")) != "triton":
        raise ValueError(f"D2S_KERNELS={used} launches no kernel that has tiles")
    tune_all(todo, arguments.minutes, arguments.out)


def main(argv: list[str] | None = None) -> int:
    """Returns 0, or 1 if the GPU failed, 2 without a GPU or for a user's mistake, 130 if interrupted."""
    parser = Parser(prog="python -m d2s.kernels.tune", description=__doc__.split("\n")[0])
    parser.add_argument("--kernel", choices=OPS, action="append", help="only this kernel; may be repeated")
    parser.add_argument("--width", type=int, choices=WIDTHS, action="append", help="only this D; likewise")
    parser.add_argument("--minutes", type=positive, default=20, help="start no kernel after this time (20)")
    parser.add_argument("--out", type=user_path, default=TABLE, help="the table to write")
    parser.add_argument("--dry-run", action="store_true", help="list the candidates, measure nothing")
    arguments = parser.parse_args(argv)
    try:
        return run(lambda: _tune(arguments))
    except RuntimeError as error:
        print(f"tune: {one_line(error)}; use --kernel or --width to skip what failed", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
