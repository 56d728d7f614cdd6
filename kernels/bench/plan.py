"""Lists the cases, types, sizes, variants and modes that a run of the benchmark measures, in order."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from d2s.kernels.bench import timing
from d2s.kernels.bench.cases import CASES
from d2s.kernels.bench.providers import PROVIDERS
from d2s.kernels.problems import Shape

QUICK_CASES = ("hinge_max", "hinge_sum", "info_nce", "gpo")
QUICK_PROVIDERS = ("ours", "eager", "released")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
WIDTH = 512
TOKENS = Shape(n=128, tokens=577, width=WIDTH)
TINY, TINY_TOKENS = Shape(n=64, width=16), Shape(n=4, tokens=9, width=16)
SIZES = {"cpu": (128, 1024, 8192), "cuda": (128, 1024, 8192, 32768, 131072)}
# Largest n in float32 without --n. float32 has no tensor cores, and n = 131,072 takes a quarter of an hour.
MOST_FLOAT32 = 32768


@dataclass(frozen=True, kw_only=True)
class Item:
    """A case to measure, with the size and the type of its inputs."""

    case: str
    dtype: str
    shape: Shape

    def __str__(self) -> str:
        return f"{self.case} {self.shape} {self.dtype}"


def shapes(case: str, dtype: str, arguments: argparse.Namespace) -> list[Shape]:
    """Returns the sizes for which a case is measured. dtype: a key of DTYPES. arguments: the command's options."""
    if arguments.size == "tiny":
        return [TINY_TOKENS if case == "gpo" else TINY]
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
    """Returns the names of the variants to measure."""
    return arguments.provider or (QUICK_PROVIDERS if arguments.quick else PROVIDERS)


def modes(case: str, arguments: argparse.Namespace) -> Sequence[str]:
    """Returns the modes to measure: only "full" with --quick and for "ranks", which has no gradient."""
    return ("full",) if arguments.quick or case == "ranks" else arguments.mode or timing.MODES


def items(arguments: argparse.Namespace) -> list[Item]:
    """Returns the items to measure, ordered by type, then case, then size. No item appears twice."""
    on_gpu = arguments.device.startswith("cuda")
    found = [
        Item(case=case, dtype=dtype, shape=shape)
        for dtype in arguments.dtype or (("bfloat16", "float32") if on_gpu else ("float32",))
        for case in arguments.only or (QUICK_CASES if arguments.quick else tuple(CASES))
        for shape in shapes(case, dtype, arguments)
    ]
    return list(dict.fromkeys(found))
