"""`python -m d2s.kernels.bench`: times our kernels, plain torch code and other people's kernels in one run.

Prints a table and appends its rows to `results/<device>.csv`.
"""

import argparse
import math
import re
import sys
import time

import torch

from d2s.common.command import Parser, positive, run, user_path
from d2s.kernels.bench import plan, record, timing
from d2s.kernels.bench.cases import CASES
from d2s.kernels.bench.measure import measure
from d2s.kernels.bench.providers import PROVIDERS

# On a GPU, a variant gets no further repeats after this many seconds.
LONGEST = 10.0


def _device(text: str) -> str:
    if not re.fullmatch(r"cpu|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not cpu, cuda or cuda:1")
    return text


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m d2s.kernels.bench", description=__doc__.split("\n")[0])
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=_device, default=default, help="cpu, cuda or cuda:1")
    parser.add_argument("--quick", action="store_true", help="main cases, ours and plain ways, few repeats")
    parser.add_argument("--size", choices=("full", "tiny"), default="full", help="tiny: a test that it runs")
    parser.add_argument("--only", choices=tuple(CASES), action="append", help="only these cases")
    parser.add_argument("--mode", choices=timing.MODES, action="append", help="only these modes")
    parser.add_argument("--provider", choices=PROVIDERS, action="append", help="only these variants")
    parser.add_argument("--dtype", choices=tuple(plan.DTYPES), action="append", help="instead of the default")
    parser.add_argument("--n", type=positive, action="append", help="only these numbers of rows")
    repeat = "timed rounds: 3 with --quick, else 10, on CUDA 50 or as many as take 10 s"
    parser.add_argument("--repeat", type=positive, help=repeat)
    parser.add_argument("--out", type=user_path, help="folder of the CSV; by default --size tiny writes none")
    arguments = parser.parse_args(argv)
    if arguments.size == "tiny" and arguments.n:
        parser.error("--n: --size tiny has sizes of its own; leave one of them out")
    on_gpu = arguments.device.startswith("cuda")
    arguments.longest = LONGEST if on_gpu and not arguments.repeat else math.inf
    arguments.repeat = arguments.repeat or (3 if arguments.quick else 50 if on_gpu else 10)
    # A GPU takes several rounds to reach its full clock rate.
    arguments.warm = 6 if on_gpu else 1
    return arguments


def measure_all(arguments: argparse.Namespace) -> set[str]:
    """Measures all items and returns the names of the measured variants.

    Prints and writes the rows after each item, so that an interrupted run keeps the rows of all finished items.
    Raises ValueError if the device is CUDA and this machine has none.
    """
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError("no CUDA device; use --device cpu")
    torch.backends.cuda.matmul.allow_tf32 = False
    folder = arguments.out or (record.RESULTS if arguments.size == "full" else None)
    now, measured = record.circumstances(arguments.device), set()
    if folder:
        record.check_writable(folder, now["device"])
    print(f"{now['device']}; torch {now['torch']}, triton {now['triton'] or 'none'}, {now['date']}")
    begun, todo, dtype = time.monotonic(), plan.items(arguments), None
    for number, item in enumerate(todo, 1):
        if item.dtype != dtype:
            dtype = item.dtype
            rates = timing.device_rates(plan.DTYPES[dtype], arguments.device, arguments.size == "tiny")
            print(
                f"{dtype}: matrix product {rates[0]:.3f} TFLOP/s, copy {rates[1]:.1f} GB/s\n{record.HEADER}"
            )
        passed = f"{(time.monotonic() - begun) / 60:.1f} min"
        print(f"bench: {number} of {len(todo)} after {passed}: {item}", file=sys.stderr, flush=True)
        rows = measure(item, rates, arguments)
        record.show(rows)
        if folder:
            record.append(folder, rows)
        measured.update(row.provider for row in rows)
    return measured


def main(argv: list[str] | None = None) -> int:
    """Returns 0, or 1 if "ours" or a --provider was not measured, 2 for a user's mistake, 130 if interrupted."""
    arguments, measured = _arguments(argv), set()
    code = run(lambda: measured.update(measure_all(arguments)))
    missing = {"ours", *(arguments.provider or ())}.intersection(plan.providers(arguments)) - measured
    if code == 0 and missing:
        print(f"bench: nothing was measured of {', '.join(sorted(missing))}", file=sys.stderr)
    return code or int(bool(missing))


if __name__ == "__main__":
    sys.exit(main())
