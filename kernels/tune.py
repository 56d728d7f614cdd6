"""`python -m d2s.kernels.tune`: measures tiles on the device at hand and writes the table to commit.

For each op, bucket of D and size of type it starts from the defaults and takes one step at a time: half or double
of one kernel's rows, columns or warps, one stage more or less, or another depth for all kernels of the op at once,
because its forward and its backward must add S up in the same order. A step is measured if what it builds neither
spills nor exceeds the shared memory, and taken if it is faster by more than NOISE. Training never times anything:
it reads the table.
"""

import argparse
import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from d2s.kernels import builds
from d2s.kernels.descent import State, descend, moves, tunable

if TYPE_CHECKING:
    from d2s.kernels.fused.spec import KernelSpec
    from d2s.kernels.fused.tiles import Tile

TABLE = Path(__file__).parent / "fused" / "tiles.json"
# The widths that matter most first: a run that ends early has them.
WIDTHS = (512, 256, 1152, 128, 64)
SIZE = 8192

# Kernels whose name does not begin with their benchmark's; of several ops that share one, the first in use.
OPS = {"hinge_gather": "hinge_max", "products": "info_nce", "positives": "info_nce"}
# Launched for small batches alone, which are not what is measured: they keep their defaults.
SMALL = ("hinge_few",)


def op_of(kernel: str, ops: Sequence[str]) -> str | None:
    """The benchmark that launches a kernel, by its name: `hinge_max_sweep` belongs to `hinge_max`."""
    return OPS.get(kernel) or max((op for op in ops if kernel.startswith(op)), key=len, default=None)


def start_of(specs: Mapping[str, "KernelSpec"], width: int, half: bool) -> dict[str, "Tile"]:
    """The default tiles."""
    from d2s.kernels.fused.tiles import default_tile

    return {name: default_tile(name, width, half) for name in specs}


def groups(kernels: Sequence[str] | None = None) -> dict[str, dict[str, "KernelSpec"]]:
    """The kernels to tune, by op. Raises ValueError for a kernel whose op has no benchmark."""
    from d2s.kernels.bench.cases import CASES
    from d2s.kernels.fused import ALL_SPECS

    found: dict[str, dict[str, KernelSpec]] = {}
    for spec in ALL_SPECS:
        if not tunable(spec) or spec.name in SMALL or (kernels and spec.name not in kernels):
            continue
        op = op_of(spec.name, tuple(CASES))
        if op is None:
            raise ValueError(f"{spec.name}: no benchmark's name begins its name")
        found.setdefault(op, {})[spec.name] = spec
    return found


def _usable(
    states: Sequence[State],
    state: State,
    specs: Mapping[str, "KernelSpec"],
    width: int,
    half: bool,
    arch: int,
    processes: int,
) -> list[State]:
    """Those of states whose kernels, as far as they differ from state's, build, fit and do not spill."""
    dtype = "bf16" if half else "fp32"
    wanted = {
        (name, tile): builds.Job(kernel=name, tile=tile, width=width, dtype=dtype, arch=arch)
        for other in states
        for name, tile in other.items()
        if tile != state[name] and dtype in specs[name].dtypes
    }
    results = builds.build_all(list(wanted.values()), processes)
    bad = {key for key, built in zip(wanted, results, strict=True) if builds.faults(built, {}, dots=False)}
    return [other for other in states if not bad & {*other.items()}]


def _measure(op: str, width: int, half: bool, capability: tuple[int, int]) -> Callable[[State], float]:
    """The milliseconds of forward and backward of an op with the tiles of a state; infinite where it fails."""
    import torch

    from d2s.kernels.bench import timing
    from d2s.kernels.bench.cases import CASES, Shape
    from d2s.kernels.fused.tiles import entry, tuned_tiles

    case = CASES[op]
    # GPO's table goes by tokens.
    shape = Shape(n=64, tokens=width, width=512) if op == "gpo" else Shape(n=SIZE, width=width)
    inputs = [case.make(shape, torch.bfloat16 if half else torch.float32, "cuda", seed) for seed in range(3)]

    def measure(state: State) -> float:
        for name, tile in state.items():
            tuned_tiles()[entry(name, capability, width, half)] = dataclasses.asdict(tile)
        try:
            times = timing.in_turn({op: case.ours}, inputs, "full", repeats=15, warm=3, device="cuda")
        # Whatever a tile does to the launch, it is no candidate.
        except Exception as error:  # noqa: BLE001
            print(f"  {_text(state)}: {type(error).__name__}: {str(error).splitlines()[:1]}")
            return float("inf")
        return timing.quantile(times[op], 0.5)

    return measure


def _text(state: State) -> str:
    return ", ".join(
        f"{name} {t.rows}x{t.columns}x{t.depth}/{t.warps}w{t.stages}s" for name, t in state.items()
    )


def write(table: Mapping[str, Mapping[str, int]], path: Path) -> None:
    """The table, one entry a line."""
    lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(dict(table[key]))}" for key in sorted(table))
    path.write_text(f"{{\n{lines}\n}}\n" if lines else "{}\n", encoding="utf-8")


def tune(arguments: argparse.Namespace) -> int:
    """Measures and writes after every op, so that an interrupted run leaves what it found."""
    import torch

    from d2s.kernels.fused.tiles import entry, tuned_tiles

    capability = torch.cuda.get_device_capability()
    arch = 10 * capability[0] + capability[1]
    started, table = time.monotonic(), {k: dict(v) for k, v in tuned_tiles().items()}
    for width, half, op, specs in _plan(arguments):
        if time.monotonic() - started > 60 * arguments.minutes:
            print(
                f"tune: {arguments.minutes:g} minutes are over; the rest keeps the defaults", file=sys.stderr
            )
            break
        begin = start_of(specs, width, half)
        best, fastest, first = descend(
            begin,
            lambda state, s=specs, w=width, h=half: moves(s, state, w, h),
            lambda states, state, s=specs, w=width, h=half: _usable(
                states, state, s, w, h, arch, arguments.jobs
            ),
            _measure(op, width, half, capability),
        )
        kind = "half" if half else "float"
        print(f"{op} D={width} {kind}: {first:.3f} -> {fastest:.3f} ms: {_text(best)}", flush=True)
        for name, tile in best.items():
            key = entry(name, capability, width, half)
            table.pop(key, None)
            if tile != begin[name]:
                table[key] = dataclasses.asdict(tile)
            # The next op is measured with what is committed, not with the last trial.
            tuned_tiles()[key] = dataclasses.asdict(tile)
        write(table, arguments.out)
    print(f"written: {arguments.out}")
    return 0


def _plan(arguments: argparse.Namespace) -> Iterator[tuple[int, bool, str, dict[str, "KernelSpec"]]]:
    by_op = groups(arguments.kernel)
    for width in arguments.width or WIDTHS:
        for half in (True, False):
            for op, specs in by_op.items():
                yield width, half, op, specs


def _dry_run(arguments: argparse.Namespace) -> int:
    count = 0
    for width, half, op, specs in _plan(arguments):
        start = start_of(specs, width, half)
        print(f"{op} D={width} {'half' if half else 'float'}: from {_text(start)}")
        for state in moves(specs, start, width, half):
            changed = {name: tile for name, tile in state.items() if tile != start[name]}
            print(f"  {_text(changed)}")
            count += 1
    print(f"{count} first steps")
    return 0


def main(argv: list[str] | None = None) -> int:
    """0, or 2 where there is no CUDA device."""
    parser = argparse.ArgumentParser(prog="python -m d2s.kernels.tune", description=__doc__.split("\n")[0])
    parser.add_argument("--kernel", action="append", help="these kernels alone")
    parser.add_argument("--width", type=int, action="append", help=f"these D alone, of {WIDTHS}")
    parser.add_argument("--minutes", type=float, default=20, help="start no further op after that")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes that build")
    parser.add_argument("--out", type=Path, default=TABLE)
    parser.add_argument("--dry-run", action="store_true", help="list the first steps from the defaults")
    arguments = parser.parse_args(argv)
    try:
        import torch
        import triton  # noqa: F401
    except ImportError as error:
        print(f"tune: {error}", file=sys.stderr)
        return 2
    if arguments.dry_run:
        return _dry_run(arguments)
    if not torch.cuda.is_available():
        print("tune: no CUDA device here; --dry-run lists what would be measured", file=sys.stderr)
        return 2
    return tune(arguments)


if __name__ == "__main__":
    sys.exit(main())
