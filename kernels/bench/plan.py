"""What a run measures, in which order, and about how long it takes: said before and between the cases."""

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from d2s.kernels.bench import timing
from d2s.kernels.bench.cases import CASES, Shape
from d2s.kernels.bench.floor import work
from d2s.kernels.bench.providers import PROVIDERS

QUICK_CASES = ("hinge_max", "hinge_sum", "info_nce", "gpo")
QUICK_PROVIDERS = ("ours", "eager", "released")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
WIDTH = 512
TOKENS = Shape(n=128, tokens=577, width=WIDTH)
TINY = {"gpo": Shape(n=4, tokens=9, width=16)}
SIZES = {"cpu": (128, 1024, 8192), "cuda": (128, 1024, 8192, 32768, 131072)}
# float32 has no tensor cores: 131,072 rows of it take a quarter of an hour and are measured where --n asks for them.
MOST_FLOAT32 = 32768
# For the first guess: a step against its floor, and seconds to compile a variant or to start its process.
SLOWNESS, START = 5.0, 3.0


@dataclass(frozen=True, kw_only=True)
class Item:
    """One case at one size in one type."""

    case: str
    dtype: str
    shape: Shape

    def __str__(self) -> str:
        return f"{self.case} {self.shape} {self.dtype}"


def shapes(case: str, dtype: str, arguments: argparse.Namespace) -> list[Shape]:
    """The sizes of a case, in the order of the sweep."""
    if arguments.size == "tiny":
        return [TINY.get(case, Shape(n=64, width=16))]
    if case == "gpo":
        return [TOKENS]
    if arguments.n:
        sizes = arguments.n
    elif arguments.quick:
        sizes = [8192]
    else:
        sizes = SIZES["cuda" if arguments.device.startswith("cuda") else "cpu"]
        sizes = [n for n in sizes if dtype != "float32" or n <= MOST_FLOAT32]
    return [Shape(n=n, width=WIDTH) for n in sizes]


def providers(arguments: argparse.Namespace) -> Sequence[str]:
    """The variants that are tried."""
    return arguments.provider or (QUICK_PROVIDERS if arguments.quick else PROVIDERS)


def modes(case: str, arguments: argparse.Namespace) -> Sequence[str]:
    """The modes of a case; ranks have no gradient."""
    return ("full",) if arguments.quick or case == "ranks" else arguments.mode or timing.MODES


def items(arguments: argparse.Namespace) -> list[Item]:
    """What is measured, by type, case and size."""
    on_gpu = arguments.device.startswith("cuda")
    found = [
        Item(case=case, dtype=dtype, shape=shape)
        for dtype in arguments.dtype or (("bfloat16", "float32") if on_gpu else ("float32",))
        for case in arguments.only or (QUICK_CASES if arguments.quick else tuple(CASES))
        for shape in shapes(case, dtype, arguments)
    ]
    return list(dict.fromkeys(found))


def guess(item: Item, ceiling: tuple[float, float], arguments: argparse.Namespace) -> float:
    """Seconds that an item takes, by its floor; right to a factor of a few."""
    names = len(providers(arguments))
    seconds = float(names * START)
    for mode in modes(item.case, arguments):
        least = work(item.case, item.shape, DTYPES[item.dtype], mode).floor_ms(*ceiling)
        step = SLOWNESS * least / 1e3
        every = step * (arguments.warm + arguments.repeat)
        seconds += names * min(every, max(arguments.longest, timing.FEWEST * step))
    return seconds


class Progress:
    """Says on stderr what is measured now and about how much is left; corrects its guesses by what things took."""

    def __init__(self, guesses: Mapping[Item, float]) -> None:
        self.guesses, self.begun = dict(guesses), time.monotonic()
        self.passed = 0
        self._say(f"bench: {len(self.guesses)} cases and sizes, about {_minutes(sum(guesses.values()))}")

    def next(self, item: Item) -> None:
        """To be called before each item, in their order."""
        before, after = (
            [*self.guesses.values()][part] for part in (slice(self.passed), slice(self.passed, None))
        )
        spent = time.monotonic() - self.begun
        left = sum(after) * (spent / sum(before) if before else 1)
        self.passed += 1
        at = f"{self.passed} of {len(self.guesses)}"
        self._say(f"bench: {at}, {item}; {_minutes(spent)} gone, about {_minutes(left)} to go")

    @staticmethod
    def _say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.1f} min"
