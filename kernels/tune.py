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

from d2s.kernels import compile as building

if TYPE_CHECKING:
    from d2s.kernels.fused.spec import KernelSpec
    from d2s.kernels.fused.tiles import Tile

TABLE = Path(__file__).parent / "fused" / "tiles.json"
NOISE = 0.02
ROUNDS = 2
# The widths that matter most first: a run that ends early has them.
WIDTHS = (512, 256, 1152, 128, 64)
SIZE = 8192
LOWEST = {"rows": 16, "columns": 16, "depth": 16, "warps": 1, "stages": 1}
HIGHEST = {"rows": 1024, "columns": 256, "depth": 256, "warps": 16, "stages": 5}

# Kernels whose name does not begin with their benchmark's; of several ops that share one, the first in use.
OPS = {"hinge_gather": "hinge_max", "products": "info_nce"}
# Launched for small batches alone, which are not what is measured: they keep their defaults.
SMALL = ("hinge_few",)

State = Mapping[str, "Tile"]


def op_of(kernel: str, ops: Sequence[str]) -> str | None:
    """The benchmark that launches a kernel, by its name: `hinge_max_sweep` belongs to `hinge_max`."""
    return OPS.get(kernel) or max((op for op in ops if kernel.startswith(op)), key=len, default=None)


def steps(spec: "KernelSpec", tile: "Tile", width: int, half: bool) -> list["Tile"]:
    """The tiles one step away that build something else, the depth apart."""
    found = {}
    for name in ("rows", "columns", "warps", "stages"):
        value = getattr(tile, name)
        for other in (value - 1, value + 1) if name == "stages" else (value // 2, value * 2):
            if LOWEST[name] <= other <= HIGHEST[name]:
                step = dataclasses.replace(tile, **{name: other})
                found.setdefault(_build_of(spec, step, width, half), step)
    found.pop(_build_of(spec, tile, width, half), None)
    return list(found.values())


def _build_of(spec: "KernelSpec", tile: "Tile", width: int, half: bool) -> tuple:
    own = spec.options(tile, width, half) if spec.options else {}
    options = {"num_warps": tile.warps, "num_stages": tile.stages, **own}
    return tuple(options.items()), tuple(spec.constants(tile, width, half).items())


def tunable(spec: "KernelSpec") -> bool:
    """Whether a kernel's build follows from a tile of its own: the others have no entry in the table."""
    from d2s.kernels.fused.tiles import Tile

    if spec.row not in ("", spec.name):
        return False
    one = Tile(rows=16, columns=16, depth=16, warps=4, stages=1)
    other = Tile(rows=32, columns=64, depth=128, warps=4, stages=1)
    return spec.constants(one, 256, True) != spec.constants(other, 256, True)


def moves(
    specs: Mapping[str, "KernelSpec"], state: State, width: int, half: bool
) -> Iterator[dict[str, "Tile"]]:
    """The states one step away from a state."""
    for name, tile in state.items():
        for step in steps(specs[name], tile, width, half):
            yield {**state, name: step}
    depths = {tile.depth for tile in state.values()}
    for depth in sorted({d for old in depths for d in (old // 2, old * 2)} - depths):
        if LOWEST["depth"] <= depth <= HIGHEST["depth"]:
            yield {name: dataclasses.replace(tile, depth=depth) for name, tile in state.items()}


def descend(
    start: State,
    around: Callable[[State], Iterator[dict[str, "Tile"]]],
    usable: Callable[[Sequence[State], State], list[State]],
    measure: Callable[[State], float],
) -> tuple[State, float, float]:
    """(best state, its time, the start's time): takes every step that gains more than NOISE, ROUNDS times over."""
    best, first = start, measure(start)
    fastest = first
    for _ in range(ROUNDS):
        before = best
        for candidate in usable(list(around(best)), best):
            # A step was made from the state at the start of the round: only what it changes is tried.
            changed = {name: tile for name, tile in candidate.items() if tile != before[name]}
            trial = {**best, **changed}
            spent = measure(trial)
            if spent < fastest * (1 - NOISE):
                best, fastest = trial, spent
        if best == before:
            break
    return best, fastest, first


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
        (name, tile): building.Job(kernel=name, tile=tile, width=width, dtype=dtype, arch=arch)
        for other in states
        for name, tile in other.items()
        if tile != state[name] and dtype in specs[name].dtypes
    }
    results = building.build_all(list(wanted.values()), processes)
    bad = {key for key, built in zip(wanted, results, strict=True) if building.faults(built, {}, dots=False)}
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
