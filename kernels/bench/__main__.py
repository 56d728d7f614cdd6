"""`python -m d2s.kernels.bench`: ours against the plain way, and against other kernels, side by side in one run.

Peak memory on a CPU is the process' high-water mark, taken in a process of its own for every variant.
"""

import argparse
import math
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from d2s.common.command import positive
from d2s.kernels.bench import plan, record, timing
from d2s.kernels.bench.cases import CASES, Inputs, Run, Shape
from d2s.kernels.bench.floor import work
from d2s.kernels.bench.providers import PROVIDERS, Unavailable, provider
from d2s.kernels.bench.table import HEADER, show

# Up to here a GPU is timed by CUDA graphs, too: launches cost more than the work.
LAUNCH_BOUND = 1024
# Seconds after which a variant on a GPU is repeated no more.
LONGEST = 10.0


def _runs(case: str, shape: Shape, dtype: torch.dtype, arguments: argparse.Namespace) -> dict[str, Run]:
    """The variants that work at this size, each having run once; says why another does not."""
    found = {}
    inputs = CASES[case].make(shape, dtype, arguments.device, 0)
    for name in plan.providers(arguments):
        run, why = _tried(name, case, shape, inputs, arguments)
        if run is None:
            # Only here: in the handler the exception still holds every tensor of the failed step.
            timing.release(arguments.device)
            if why:
                print(f"  {why}", flush=True)
        else:
            found[name] = run
    return found


def _tried(
    name: str, case: str, shape: Shape, inputs: Inputs, arguments: argparse.Namespace
) -> tuple[Run | None, str]:
    """A variant after its first step, or why there is none; no word of a missing one that nobody asked for."""
    try:
        run = provider(name, case, arguments.device, shape.width)
        timing.step(run, inputs, "full")[0]()
        if arguments.device.startswith("cuda"):
            torch.cuda.synchronize(arguments.device)
    except Unavailable as error:
        return None, str(error) if arguments.provider else ""
    # Out of memory, a compiler that is missing, another package's bug: the others are measured all the same.
    except Exception as error:  # noqa: BLE001
        return None, f"{name}: {timing.reason(error)}"
    return run, ""


def _memory(
    name: str, run: Run, case: str, shape: Shape, dtype: str, arguments: argparse.Namespace
) -> float | None:
    """Mebibytes; None, and a line that says why, where it cannot be measured."""
    if arguments.device.startswith("cuda"):
        try:
            return _memory_here(run, case, shape, dtype, arguments) / 2**20
        # A peer may not take the few rows of the first step; its times are measured all the same.
        except Exception as error:  # noqa: BLE001
            print(f"  {name}: peak memory: {timing.reason(error)}")
        timing.release(arguments.device)
        return None
    command = [
        sys.executable,
        "-m",
        "d2s.kernels.bench",
        "--device",
        arguments.device,
        "--size",
        arguments.size,
    ]
    command += ["--dtype", dtype, "--only", case, "--n", str(shape.n), "--peak", name]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        print(f"  {name}: peak memory: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
        return None
    return int(done.stdout.split()[-1]) / 2**20


def _memory_here(run: Run, case: str, shape: Shape, dtype: str, arguments: argparse.Namespace) -> int:
    make, kind = CASES[case].make, plan.DTYPES[dtype]
    small = Shape(n=min(shape.n, 64), width=shape.width, tokens=shape.tokens)
    return timing.extra_bytes(
        run,
        make(shape, kind, arguments.device, 0),
        make(small, kind, arguments.device, 0),
        arguments.device,
    )


def measure(item: plan.Item, ceiling: tuple[float, float], arguments: argparse.Namespace) -> list[record.Row]:
    """All variants and modes of a case at one size."""
    case, dtype, shape = item.case, item.dtype, item.shape
    kind = plan.DTYPES[dtype]
    runs = _runs(case, shape, kind, arguments)
    if not runs:
        return []
    first = CASES[case].make(shape, kind, arguments.device, 0)
    count = timing.sets_needed(first.nbytes(), arguments.device)
    inputs = [first, *(CASES[case].make(shape, kind, arguments.device, seed) for seed in range(1, count))]
    extra = {name: _memory(name, run, case, shape, dtype, arguments) for name, run in runs.items()}
    rows = []
    for mode in plan.modes(case, arguments):
        row = _row_maker(case, mode, shape, dtype, ceiling, arguments)
        refused: dict[str, str] = {}
        times = timing.in_turn(
            runs, inputs, mode, arguments.repeat, arguments.warm, arguments.device, arguments.longest, refused
        )
        if refused:
            timing.release(arguments.device)
            print("\n".join(f"  {name}: {mode}: {why}" for name, why in refused.items()), flush=True)
        memory = extra if mode == "full" else {}
        clock = "events" if arguments.device.startswith("cuda") else "wall"
        rows += [row(name, clock, spent, memory.get(name)) for name, spent in times.items()]
        if arguments.device.startswith("cuda") and shape.n <= LAUNCH_BOUND and mode != "backward":
            rows += _graph_rows({name: runs[name] for name in times}, inputs, mode, row, arguments)
    return rows


def _graph_rows(
    runs: dict[str, Run],
    inputs: list[Inputs],
    mode: str,
    row: Callable[..., record.Row],
    arguments: argparse.Namespace,
) -> list[record.Row]:
    times, refused = timing.graphs_in_turn(runs, inputs, mode, arguments.repeat)
    for name, reason in refused.items():
        print(f"  {name}: no CUDA graph: {reason}")
    return [row(name, "graph", spent, None) for name, spent in times.items()]


def _row_maker(
    case: str,
    mode: str,
    shape: Shape,
    dtype: str,
    ceiling: tuple[float, float],
    arguments: argparse.Namespace,
) -> Callable[..., record.Row]:
    least = work(case, shape, plan.DTYPES[dtype], mode)

    def row(name: str, clock: str, spent: list[float], extra: float | None) -> record.Row:
        median = timing.quantile(spent, 0.5)
        return record.Row(
            date=record.today(),
            device=record.device_name(arguments.device),
            **record.versions(),
            threads=torch.get_num_threads(),
            case=case,
            mode=mode,
            provider=name,
            dtype=dtype,
            n=shape.n,
            tokens=shape.tokens,
            width=shape.width,
            timing=clock,
            repeats=len(spent),
            median_ms=median,
            p20_ms=timing.quantile(spent, 0.2),
            p80_ms=timing.quantile(spent, 0.8),
            extra_mib=extra,
            tflops=least.flops / median / 1e9,
            matmul_tflops=ceiling[0],
            copy_gbs=ceiling[1],
            floor_ms=least.floor_ms(*ceiling),
        )

    return row


def _device(text: str) -> str:
    if not re.fullmatch(r"cpu|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not cpu, cuda or cuda:1")
    return text


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m d2s.kernels.bench", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--device",
        type=_device,
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu, cuda or cuda:1",
    )
    parser.add_argument(
        "--quick", action="store_true", help="ours and the plain ways, the main cases, few repeats"
    )
    parser.add_argument("--size", choices=("full", "tiny"), default="full", help="tiny: does it run at all")
    parser.add_argument("--only", choices=tuple(CASES), action="append", help="these cases alone")
    parser.add_argument("--mode", choices=timing.MODES, action="append", help="these modes alone")
    parser.add_argument("--provider", choices=PROVIDERS, action="append", help="these variants alone")
    parser.add_argument(
        "--dtype", choices=tuple(plan.DTYPES), action="append", help="float32; on CUDA bfloat16, too"
    )
    parser.add_argument("--n", type=positive, action="append", help="these numbers of rows alone")
    parser.add_argument(
        "--repeat",
        type=positive,
        help="timed rounds: 3 if quick, else 10, on CUDA 50 or as many as take 10 s",
    )
    parser.add_argument(
        "--out", type=Path, help="folder of the CSV; tiny sizes are written nowhere by default"
    )
    parser.add_argument("--peak", choices=PROVIDERS, help=argparse.SUPPRESS)
    return parser


def _peak(arguments: argparse.Namespace) -> int:
    case, dtype = arguments.only[0], arguments.dtype[0]
    shape = plan.shapes(case, dtype, arguments)[0]
    run = provider(arguments.peak, case, arguments.device, shape.width)
    print(_memory_here(run, case, shape, dtype, arguments))
    return 0


def main(argv: list[str] | None = None) -> int:
    """Prints the table and appends its rows to the device's CSV."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.size == "tiny" and arguments.n and not arguments.peak:
        parser.error("--n: --size tiny has sizes of its own; leave one of them out")
    on_gpu = arguments.device.startswith("cuda")
    if on_gpu and not torch.cuda.is_available():
        print("bench: no CUDA device; use --device cpu", file=sys.stderr)
        return 2
    if arguments.peak:
        return _peak(arguments)
    # Who asks for a number of repeats gets it.
    arguments.longest = LONGEST if on_gpu and not arguments.repeat else math.inf
    arguments.repeat = arguments.repeat or (3 if arguments.quick else 50 if on_gpu else 10)
    # Every variant has run once before its memory is taken; a GPU's clocks want more than that.
    arguments.warm = 5 if on_gpu else 0
    torch.backends.cuda.matmul.allow_tf32 = False
    folder = arguments.out or (record.RESULTS if arguments.size == "full" else None)
    try:
        if folder:
            record.ready(folder, record.device_name(arguments.device))
        measured = _everything(arguments, folder)
    except KeyboardInterrupt:
        print("bench: interrupted; the cases before are measured and written", file=sys.stderr)
        return 130
    except (OSError, ValueError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    lacking = {"ours", *(arguments.provider or ())}.intersection(plan.providers(arguments)) - measured
    if lacking:
        print(f"bench: nothing was measured of {', '.join(sorted(lacking))}", file=sys.stderr)
    return 1 if lacking else 0


def _everything(arguments: argparse.Namespace, folder: Path | None) -> set[str]:
    """Measures, prints and records; what a run that ends early has measured is in the file. Gives the variants."""
    measured: set[str] = set()
    device, version = record.device_name(arguments.device), record.versions()
    print(f"{device}; torch {version['torch']}, triton {version['triton'] or 'none'}, {record.today()}")
    todo = plan.items(arguments)
    ceilings = {
        dtype: timing.ceilings(plan.DTYPES[dtype], arguments.device, arguments.size == "tiny")
        for dtype in dict.fromkeys(item.dtype for item in todo)
    }
    progress = plan.Progress({item: plan.guess(item, ceilings[item.dtype], arguments) for item in todo})
    dtype = None
    for item in todo:
        ceiling = ceilings[item.dtype]
        if item.dtype != dtype:
            dtype = item.dtype
            print(f"{dtype}: matrix product {ceiling[0]:.3f} TFLOP/s, copy {ceiling[1]:.1f} GB/s\n{HEADER}")
        progress.next(item)
        rows = measure(item, ceiling, arguments)
        show(rows)
        if folder:
            record.append(folder, rows)
        measured.update(row.provider for row in rows)
    return measured


if __name__ == "__main__":
    sys.exit(main())
